"""The loops that people use: Lightning, transformers and accelerate give the weights of a bare loop."""

import copy
import io
import math

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from caspr_cli.optim import CASPR

OPTIONS = {"lr": 0.02, "start_step": 3, "interval": 2, "betas": (0.9, 0.95), "weight_decay": 0.01}
EPOCHS = 2


class Rows(Dataset):
    """32 rows of a fixed regression, as dictionaries."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(32, 5, generator=generator)
        self.y = torch.sin(self.x.sum(1, keepdim=True))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "labels": self.y[index]}


class Network(torch.nn.Module):
    """Takes x and labels by name and returns the loss, as transformers expects of a model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def forward(self, x, labels):
        return {"loss": torch.nn.functional.mse_loss(self.layers(x), labels)}


def loader():
    return DataLoader(Rows(), batch_size=8, shuffle=False)


def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def bare_loop(max_norm=math.inf, schedule=None):
    """8 steps: two epochs of four batches."""
    model = Network()
    optimizer = CASPR(model.parameters(), **OPTIONS)
    scheduler = schedule(optimizer) if schedule else None
    for _ in range(EPOCHS):
        for batch in loader():
            optimizer.zero_grad()
            model(**batch)["loss"].backward()
            if max_norm < math.inf:
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            if scheduler:
                scheduler.step()
    return weights_of(model)


def linear_to_zero(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, (8 - step) / 8))


def lightning_module(lightning):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = Network()

        def training_step(self, batch, index):
            return self.network(**batch)["loss"]

        def configure_optimizers(self):
            return CASPR(self.parameters(), **OPTIONS)

    return Module()


def lightning_trainer(lightning, path, **options):
    settings = {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return lightning.Trainer(default_root_dir=path, **{**settings, **quiet, **options})


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_to_the_same_weights(tmp_path):
    """A checkpoint after one epoch, restored by a new trainer into a new module."""
    lightning = pytest.importorskip("lightning")
    module = lightning_module(lightning)
    trainer = lightning_trainer(lightning, tmp_path, max_epochs=1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    module = lightning_module(lightning)
    trainer = lightning_trainer(lightning, tmp_path)
    trainer.fit(module, loader(), ckpt_path=str(tmp_path / "one.ckpt"))
    assert trainer.global_step == 8
    assert torch.equal(weights_of(module), bare_loop())


@pytest.mark.release
@pytest.mark.filterwarnings("ignore")
def test_transformers_trainer_gives_the_bare_loop(tmp_path):
    """With its own clipping and its own linear schedule."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = Network()
    optimizer = CASPR(model.parameters(), **OPTIONS)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=EPOCHS, per_device_train_batch_size=8, max_grad_norm=1.0,
        lr_scheduler_type="linear", report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False,
    )  # fmt: skip

    class InOrder(transformers.Trainer):
        def get_train_dataloader(self):
            return self.accelerator.prepare(loader())

    trainer = InOrder(model=model, args=arguments, train_dataset=Rows(), optimizers=(optimizer, None))
    result = trainer.train()
    assert result.global_step == 8
    assert all(float(state["step"]) == 8 for state in optimizer.state.values())
    expected = bare_loop(max_norm=1.0, schedule=linear_to_zero)
    assert torch.allclose(weights_of(model), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.release
@pytest.mark.filterwarnings("ignore")
def test_accelerate_gives_the_bare_loop_and_its_state_returns():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = Network()
    optimizer = CASPR(model.parameters(), **OPTIONS)
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader())
    for epoch in range(EPOCHS):
        for batch in batches:
            optimizer.zero_grad()
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
        if epoch == 0:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(weights_of(model), bare_loop())


def test_a_copied_model_stays_where_it_was():
    """The optimizer holds its parameters' memory by reference; a copy, as averaging helpers take it, is apart."""
    model = Network()
    optimizer = CASPR(model.parameters(), **OPTIONS)
    for batch in loader():
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    other = copy.deepcopy(model)
    held = weights_of(other).clone()
    model(**batch)["loss"].backward()
    optimizer.step()
    assert torch.equal(weights_of(other), held)
