"""Numbers one can decide on: suites, intervals, baselines, comparison, report.

Importing this package loads no torch; `base` and `task`, which run models, are imported by who needs them.
"""

from gptcore.evaluation.comparison import Comparison, compare
from gptcore.evaluation.intervals import Interval
from gptcore.evaluation.results import compare_evaluations, headline, read_results, summary_rows

__all__ = ["Comparison", "Interval", "compare", "compare_evaluations", "headline", "read_results", "summary_rows"]
