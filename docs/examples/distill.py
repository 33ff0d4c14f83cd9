"""Teacher and student: a teacher that may see the data, and a student that is published with privacy.

    python docs/examples/distill.py

The student learns from the teacher's answers and from the labels. The teacher was trained on public data here. A
teacher that was trained on the private data would carry them into every gradient of the student, unclipped, and the
student's epsilon would mean nothing.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.data import TensorDataset

import clipgrad


def student_loss(student, images, labels, answers):
    """The teacher's answers are part of the batch: they were computed once, and need no gradient."""
    logits = student(images)
    taught = (answers.exp() * (answers - log_softmax(logits, 1))).sum(1).mean()  # their divergence
    correct = (logits.argmax(1) == labels).float().mean()
    return 0.5 * cross_entropy(logits, labels) + 0.5 * taught, {"accuracy": correct}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps, for tests")
    steps = 30 if parser.parse_args().quick else 200

    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    public, private = slice(0, 500), slice(500, None)

    teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    ordinary = torch.optim.Adam(teacher.parameters(), lr=0.01)
    for _ in range(100):
        ordinary.zero_grad()
        cross_entropy(teacher(images[public]), labels[public]).backward()
        ordinary.step()
    with torch.no_grad():
        answers = log_softmax(teacher(images[private]), 1)

    data = TensorDataset(images[private], labels[private], answers)
    plan = clipgrad.PrivacyPlan(
        num_samples=len(data), expected_batch_size=128, steps=steps, delta=1e-5, noise_multiplier=1.5
    )  # fmt: skip
    student = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    inner = torch.optim.Adam(student.parameters(), lr=0.01)
    optimizer = clipgrad.DPOptimizer(inner, student, student_loss, plan=plan)
    for step, batch in enumerate(clipgrad.poisson_loader(data, plan=plan), start=1):
        loss, metrics = optimizer.backward(*batch)
        optimizer.step()
        optimizer.zero_grad()
        if step % (steps // 3) == 0:  # both are functions of the private batch, and not private
            print(
                f"step {step:3}  loss {loss:.3f}  accuracy of the batch {metrics['accuracy'].mean():.0%}"
            )
    print(f"student: epsilon {optimizer.epsilon():.2f}, {plan.delta:g} delta")


if __name__ == "__main__":
    main()
