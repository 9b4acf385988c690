"""Every setting: frozen, strict, checked once at the door. YAML + `--set section.key=value` -> `PipelineConfig`.

A section is what one stage is given; it enters the stage's fingerprint (`cost` is for none). Facts are not settings: the
vocabulary a tokenizer ended up with belongs to the tokenizer. The environment holds addresses and secrets only.
"""

from gptcore.config.loading import apply_override, load_config, parse_config, read_yaml, set_value, settings_error
from gptcore.config.model import ModelConfig, RopeScaling
from gptcore.config.pipeline import ContinualConfig, CostConfig, EvaluationConfig, PipelineConfig, TaskConfig
from gptcore.config.presets import PRESETS, preset
from gptcore.config.section import Count, Name, Positive, Section, Share
from gptcore.config.text import (
    CorpusConfig,
    FilesSource,
    HubSource,
    PythonDocsSource,
    ShardsConfig,
    Source,
    SplitConfig,
    TokenizerConfig,
)
from gptcore.config.training import BaseConfig, MaskingConfig, OptimizerConfig, TrainingConfig

__all__ = [
    "PRESETS",
    "BaseConfig",
    "ContinualConfig",
    "CorpusConfig",
    "CostConfig",
    "Count",
    "EvaluationConfig",
    "FilesSource",
    "HubSource",
    "MaskingConfig",
    "ModelConfig",
    "Name",
    "OptimizerConfig",
    "PipelineConfig",
    "Positive",
    "PythonDocsSource",
    "RopeScaling",
    "Section",
    "ShardsConfig",
    "Share",
    "Source",
    "SplitConfig",
    "TaskConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "apply_override",
    "load_config",
    "parse_config",
    "preset",
    "read_yaml",
    "set_value",
    "settings_error",
]
