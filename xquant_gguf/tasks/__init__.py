"""What a quantized cache does to answers: TruthfulQA, LongBench's multi_news and pass-key retrieval, by KV type."""

from xquant_gguf.tasks.run import TASKS, run, task_of

__all__ = ["TASKS", "run", "task_of"]
