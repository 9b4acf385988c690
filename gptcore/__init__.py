"""gptcore: from raw text to a promoted GPT. The craft; knows no Prefect, no MLflow, no terminal."""

__version__ = "0.1.0"
