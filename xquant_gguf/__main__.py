from xquant_gguf.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
