"""What the command `bench` measures. Importing this package imports no torch."""

from typing import TYPE_CHECKING

from norm_matters.core.lazy import lazy_attributes

if TYPE_CHECKING:
    from norm_matters.bench.input import InputRow, measure_input, write_input
    from norm_matters.bench.machine import machine_facts
    from norm_matters.bench.memory import copy_bandwidth
    from norm_matters.bench.norms import NormCase, NormRow, median_speedups, norm_cases
    from norm_matters.bench.numerics import Case, Measurement, numerics_cases
    from norm_matters.bench.numerics_page import ratio_text, write_numerics
    from norm_matters.bench.page import input_page, train_page, write_norms, write_page
    from norm_matters.bench.train import TrainMeasurement, best_plain, default_arms, measure_train, write_train
    from norm_matters.bench.train_arms import TrainCase

__all__ = [
    "Case",
    "InputRow",
    "Measurement",
    "NormCase",
    "NormRow",
    "TrainCase",
    "TrainMeasurement",
    "best_plain",
    "copy_bandwidth",
    "default_arms",
    "input_page",
    "machine_facts",
    "measure_input",
    "measure_train",
    "median_speedups",
    "norm_cases",
    "numerics_cases",
    "ratio_text",
    "train_page",
    "write_input",
    "write_norms",
    "write_numerics",
    "write_page",
    "write_train",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "input": ("InputRow", "measure_input", "write_input"),
        "machine": ("machine_facts",),
        "memory": ("copy_bandwidth",),
        "norms": ("NormCase", "NormRow", "median_speedups", "norm_cases"),
        "numerics": ("Case", "Measurement", "numerics_cases"),
        "numerics_page": ("ratio_text", "write_numerics"),
        "page": ("input_page", "train_page", "write_norms", "write_page"),
        "train": ("TrainMeasurement", "best_plain", "default_arms", "measure_train", "write_train"),
        "train_arms": ("TrainCase",),
    },
)
