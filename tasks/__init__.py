"""One Prefect task per verb: a thin coat over a plain function of gptcore, plus tracking and registry."""
