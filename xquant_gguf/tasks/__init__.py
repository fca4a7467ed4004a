"""What a quantized cache does to answers to questions, to programs, to long generations and to recall, by KV type."""

from xquant_gguf.tasks.run import TASKS, run, task_of

__all__ = ["TASKS", "run", "task_of"]
