"""Fine-tune a language model privately with LoRA: by ``DPTrainer``, and by a plain loop.

    python docs/examples/finetune_lm.py           # needs transformers, accelerate and peft; minutes on two cores
    python docs/examples/finetune_lm.py --quick

All text ships with packages, so nothing is downloaded. The public text is Python's language reference
(``pydoc_data``), on which a small model is trained without privacy. The text that we treat as private is PyTorch's
documentation. A private training starts from the public model, as one would start from a downloaded one, and trains
LoRA adapters alone. The picture shows what each epsilon buys: perplexity on private text that was held out.

At last it asks what a model remembers. Canaries are random strings, half of which are in the training by the toss of a
coin. The exposure of a canary (Carlini et al. 2019) says how few of 960 other random strings the model finds likelier:
1.4 bits on average for strings that were never seen, 9.9 for one that is known by heart. In a training of this size a
model remembers no string that it saw once, so each canary is 50 equal rows of a small training set. Then canaries show
plainly without privacy. They show less with epsilon = 8, but they do: epsilon is promised for one row, and 50 rows are
a group for which it is far larger. Protect people who have many rows as users (``DPTrainer(user_column=...)``).

``clipgrad.audit`` bounds the group's epsilon from below, from the same canaries. 40 coins bound little, and the number
of rows depends on them, which a serious audit avoids (docs/audit.md finds planted bugs).
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import warnings
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, logging
from transformers.trainer_callback import PrinterCallback

import clipgrad
from clipgrad import audit
from clipgrad.integrations.huggingface import DPTrainer

# PEFT asks transformers for a name that is about to be renamed.
warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
from peft import LoraConfig, get_peft_model  # noqa: E402

LENGTH, CHARACTERS, DELTA = 48, 128, 1e-5


def rows(text: str) -> list[dict[str, torch.Tensor]]:
    """Windows of text, a character each token."""
    codes = torch.tensor([ord(c) for c in text if ord(c) < CHARACTERS])
    windows = codes[: len(codes) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": window, "labels": window} for window in windows]


def private_text() -> str:
    spaces = (torch, torch.nn, torch.nn.functional, torch.Tensor)
    found = {
        value.__doc__
        for space in spaces
        for name, value in vars(space).items()
        if name[0] != "_" and isinstance(getattr(value, "__doc__", None), str)
    }
    return "\n".join(sorted(found))


def canaries(count: int) -> list[dict[str, torch.Tensor]]:
    letters = random.Random(0)
    texts = ("".join(letters.choices("QXZJKV#%&", k=LENGTH)) for _ in range(count))
    return [row for text in texts for row in rows(text)]


def public_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=CHARACTERS, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def with_adapters(state) -> torch.nn.Module:
    """The public model, frozen, and LoRA adapters to train."""
    model = public_model()
    model.load_state_dict(state)
    layers = ["c_attn", "c_fc", "c_proj"]
    config = LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=layers, fan_in_fan_out=True
    )
    return get_peft_model(model, config)


def arguments(args, steps: int, **options) -> TrainingArguments:
    return TrainingArguments(
        args.folder, max_steps=steps, per_device_train_batch_size=args.batch_size // 2,
        gradient_accumulation_steps=2, lr_scheduler_type="constant", disable_tqdm=True, report_to=[],
        logging_strategy="no", save_strategy="no", use_cpu=not torch.cuda.is_available(), **options,
    )  # fmt: skip


def run(trainer: Trainer) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def by_trainer(model, data, args, epsilon: float) -> float:
    """Private fine-tuning by ``DPTrainer``."""
    options = arguments(args, args.steps, learning_rate=args.learning_rate, max_grad_norm=0.5)
    trainer = DPTrainer(model, options, train_dataset=data, target_epsilon=epsilon, delta=DELTA)
    run(trainer)
    return trainer.epsilon()


def by_loop(model, data, args, epsilon: float) -> float:
    """The same training by a plain loop."""
    plan = clipgrad.PrivacyPlan.for_epsilon(
        epsilon, num_samples=len(data), expected_batch_size=args.batch_size, steps=args.steps, delta=DELTA,
        max_grad_norm=0.5,
    )  # fmt: skip
    adapters = [p for p in model.parameters() if p.requires_grad]
    inner = torch.optim.AdamW(adapters, lr=args.learning_rate, weight_decay=0.0)
    optimizer = clipgrad.DPOptimizer(
        inner, model, lambda model, **batch: model(**batch).loss, plan=plan
    )
    for batch in clipgrad.poisson_loader(data, plan=plan):
        optimizer.backward(**batch)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.epsilon()


def without_privacy(model, data, args, epsilon: float) -> float:
    options = arguments(args, args.steps, learning_rate=args.learning_rate)
    run(Trainer(model, options, train_dataset=data))
    return math.inf


def losses(model, data) -> torch.Tensor:
    """The mean loss of each row."""
    ids = torch.stack([row["input_ids"] for row in data])
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids.to(model.device)).logits[:, :-1].cpu()
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return each.view(len(ids), -1).mean(1)


def exposure(canaries: torch.Tensor, others: torch.Tensor) -> str:
    """The mean exposure of canaries in bits, from losses, and the standard error of the mean."""
    ranks = 1 + torch.searchsorted(others.sort().values, canaries)
    bits = math.log2(len(others) + 1) - ranks.double().log2()
    return f"{bits.mean():.1f} +- {bits.std() / len(bits) ** 0.5:.1f}"


def ask_what_it_remembers(state, private, args) -> None:
    strings = canaries(args.canaries + 960)
    print(f"\n{'exposure of canaries, in bits':30} {'in training':>13} {'left out':>13}   audit")
    for name, train in (("not private", without_privacy), ("DPTrainer, epsilon 8", by_trainer)):
        coins = audit.Canaries.draw(range(args.canaries))
        chosen = [strings[i] for i in range(args.canaries) if coins.included[i]]
        tuned = with_adapters(state)
        train(tuned, private[: args.few] + args.repeats * chosen, args, 8.0)
        found = losses(tuned, strings)
        secrets, others = found[: args.canaries], found[args.canaries :]
        tossed = torch.as_tensor(coins.included)
        shown = [exposure(secrets[which], others) for which in (tossed, ~tossed)]
        bound = audit.lower_bound(-secrets, coins.included, delta=DELTA).epsilon
        print(f"{name:30} {shown[0]:>13} {shown[1]:>13}   group epsilon >= {bound:.2f}", flush=True)


def plot(found: dict[str, tuple[float, float]], before: float, output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    points = sorted((e, p) for name, (e, p) in found.items() if name.startswith("DPTrainer"))
    axes.plot(*zip(*points, strict=True), "o-", label="DPTrainer, LoRA")
    if "plain loop" in found:
        axes.plot(*[[value] for value in found["plain loop"]], "x", ms=9, label="plain loop, LoRA")
    axes.axhline(before, color="gray", ls=":", label="public model, before")
    axes.axhline(found["not private"][1], color="black", ls="--", label="LoRA without privacy")
    axes.set(
        xlabel=f"epsilon (delta = {DELTA:g})",
        ylabel="perplexity by character, held-out private text",
        xscale="log",
    )
    axes.set_xticks([e for e, _ in points], [f"{e:g}" for e, _ in points])
    axes.minorticks_off()
    axes.legend()
    figure.tight_layout()
    figure.savefig(output, dpi=120)


def main() -> None:
    args = parse()
    logging.set_verbosity_error()
    torch.manual_seed(args.seed)
    public, private = rows("\n".join(topics.values())), rows(private_text())
    random.Random(0).shuffle(private)
    held_out, private = private[:500], private[500 : 500 + args.samples]
    print(
        f"{len(public)} public rows, {len(private)} private rows of {LENGTH} characters", flush=True
    )

    model = public_model()
    run(
        Trainer(model, arguments(args, args.public_steps, learning_rate=3e-3), train_dataset=public)
    )
    state = model.state_dict()
    before = losses(model, held_out).mean().exp().item()
    print(f"public model: perplexity {before:.2f} on private text", flush=True)

    found = {}
    trainings = {f"DPTrainer, epsilon {e:g}": (by_trainer, e) for e in args.epsilons}
    trainings["plain loop"] = by_loop, args.epsilons[-1]
    trainings["not private"] = without_privacy, math.inf
    print(f"{'training':24} {'epsilon':>8} {'perplexity':>11}")
    for name, (train, epsilon) in trainings.items():
        tuned = with_adapters(state)
        spent = train(tuned, private, args, epsilon)
        found[name] = spent, losses(tuned, held_out).mean().exp().item()
        print(f"{name:24} {spent:8.2f} {found[name][1]:11.2f}", flush=True)
    plot(found, before, args.output)
    print(f"picture: {args.output.resolve()}")
    ask_what_it_remembers(state, private, args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    parser.add_argument(
        "--seed", type=int, default=0, help="of initial weights; noise is never repeated"
    )
    parser.add_argument("--output", type=Path, default=Path("finetune_lm.png"), help="the picture")
    args = parser.parse_args()
    args.folder = tempfile.mkdtemp()
    args.public_steps, args.steps, args.samples = (
        (25, 4, 1000) if args.quick else (600, 150, 12_000)
    )
    args.batch_size, args.learning_rate = (32, 3e-3) if args.quick else (128, 3e-3)
    args.epsilons = [4.0] if args.quick else [1.0, 2.0, 4.0, 8.0]
    args.few, args.canaries, args.repeats = (200, 8, 2) if args.quick else (1000, 40, 50)
    return args


if __name__ == "__main__":
    main()
