"""The tasks: a row -> prompt and answer; an output -> a score. One small file per task, no torch."""

from gptcore.downstream.encode import answer_room, chat_template, encode_examples, prompt_ids
from gptcore.downstream.examples import build_examples
from gptcore.downstream.tasks import TASKS, headline

__all__ = ["TASKS", "answer_room", "build_examples", "chat_template", "encode_examples", "headline", "prompt_ids"]
