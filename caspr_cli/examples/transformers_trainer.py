"""CASPR in ``transformers.Trainer``: a small GPT-2 from scratch, which learns to count modulo 16.

pip install transformers accelerate
python -m caspr_cli.examples.transformers_trainer
"""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from caspr_cli import CASPR, param_groups

STEPS = 60


class Counting(Dataset[dict[str, torch.Tensor]]):
    """Sequences that go up by a step of 1, 2 or 3, modulo 16."""

    def __len__(self) -> int:
        return 2048

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (index + torch.arange(24) * (1 + index % 3)) % 16
        return {"input_ids": tokens, "labels": tokens}


def main() -> float:
    """Train, and return the loss of the last ten steps; chance is 2.77 nats."""
    torch.manual_seed(0)
    size = GPT2Config(vocab_size=16, n_positions=24, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(size)
    # The head shares the embedding's matrix, which AdamW takes as one. shard="none": the trainer saves on rank 0 alone.
    optimizer = CASPR(param_groups(model, heads=[model.lm_head]), lr=1e-2, betas=(0.9, 0.95), shard="none")
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=16, lr_scheduler_type="cosine",
            logging_steps=10, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=settings, train_dataset=Counting(), optimizers=(optimizer, None))
        trainer.train()
    return float([line["loss"] for line in trainer.state.log_history if "loss" in line][-1])


if __name__ == "__main__":
    main()
