"""What is measured: models, losses and synthetic batches from a seed."""

from __future__ import annotations

from benchmarks.workloads._workload import Workload
from benchmarks.workloads.cnn import CNN
from benchmarks.workloads.diffusion import DIFFUSION
from benchmarks.workloads.huggingface import HUGGING_FACE
from benchmarks.workloads.state_space import STATE_SPACE
from benchmarks.workloads.transformer import TRANSFORMERS

WORKLOADS = {
    workload.name: workload
    for workload in (*CNN, *TRANSFORMERS, *STATE_SPACE, *DIFFUSION, *HUGGING_FACE)
}

__all__ = ["WORKLOADS", "Workload"]
