import pickle
import re
from dataclasses import fields
from pathlib import Path

import pytest
from composing import composed
from composing import frozen as recipe
from omegaconf import OmegaConf

from caspr_cli.optim import registry
from caspr_cli.optim.family import options_of
from caspr_cli.recipe import compose
from caspr_cli.recipe.checks import LIMITS, SHARES
from caspr_cli.recipe.configs import CONF
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import OPTIMIZERS, AdamWConf, TrainerConf
from caspr_cli.tasks.registry import CONFS, TASKS


def test_every_choice_has_a_schema_and_a_description() -> None:
    assert all(entry.about for entry in (registry.OPTIMIZERS | TASKS).values())
    for name, conf in (OPTIMIZERS | CONFS).items():
        assert conf().name == name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_keys_and_defaults_are_those_of_the_entry(name: str) -> None:
    entry = registry.OPTIMIZERS[name]
    known = {each.name: each.default for each in options_of(entry.keys).values() if each.in_recipe} | entry.defaults
    assert compose.options(OPTIMIZERS[name]()) == known
    assert pickle.loads(pickle.dumps(OPTIMIZERS[name]())) == OPTIMIZERS[name]()


@pytest.mark.parametrize("optim", sorted(OPTIMIZERS))
def test_a_recipe_survives_its_file(optim: str, tmp_path: Path) -> None:
    before = recipe(f"optim={optim}", "seed=3", "task.data=files", "task.root=/somewhere")
    file = tmp_path / "config.yaml"
    file.write_text(compose.save(before))
    assert compose.load(file) == before
    assert type(compose.load(file).optim) is OPTIMIZERS[optim]


@pytest.mark.parametrize("scale", ["sample", "long", "paper", "paper_234m"])
def test_every_scale_composes(scale: str) -> None:
    assert recipe(f"scale={scale}").scale == scale


def test_debugging_is_short_and_has_a_name_of_its_own() -> None:
    fast = recipe("debug=fast")
    assert (fast.debug, fast.trainer.max_steps) == ("fast", 20)
    assert recipe("debug=fast", "trainer.max_steps=5").trainer.max_steps == 5
    assert compose.identity(fast) != compose.identity(recipe())
    assert compose.identity(recipe("debug=plan")) == compose.identity(recipe())  # finds the trials that best is of


def test_the_name_forgets_seed_and_paths_and_nothing_else() -> None:
    name = compose.identity(recipe())
    others = ("seed=7", "output_dir=/elsewhere", "resume=never", "trainer.timeout=9", "logger=[csv]")
    assert compose.identity(recipe(*others)) == name
    assert compose.identity(recipe("trainer.workers=0")) == name  # what null is where data are in memory
    for change in ("optim.lr=0.5", "trainer.max_steps=9", "task.width=64", "optim=shampoo", "trainer.devices=2"):
        assert compose.identity(recipe(change)) != name


def test_keys_that_came_later_leave_the_names_of_earlier_records() -> None:
    """A record made before there were ``axes``, ``exponent`` and ``polar``: the published sum, then named ``caspr``."""
    older = (
        "optim.lr=6e-3", "optim.betas=[0.9,0.95]", "optim.polar=false", "optim.nesterov=false", "optim.graft=adam",
        "optim.apply_dtype=null", "optim.start_step=10",
    )  # fmt: skip
    assert compose.identity(recipe(*older)) == "4e9d1440"
    for key, value in {"axes": "row", "exponent": 1, "nesterov": True, "adamw_lr_scale": 0.5}.items():
        assert compose.identity(recipe(*older, f"optim.{key}={value}")) != "4e9d1440"
    text = re.sub(
        r"\n  (axes|exponent|nesterov|polar|polar_steps|measured|adamw_lr_scale): .*", "", compose.save(recipe(*older))
    )
    assert "polar" not in text
    assert compose.parse(text) == recipe(*older)
    assert compose.identity(recipe("optim=adamw")) == compose.identity(recipe("optim=adamw", "seed=2"))


def test_a_record_with_removed_keys_is_read_at_their_defaults_and_refused_by_name_otherwise() -> None:
    now = recipe("task=ud_pos", "optim=caspr")
    older = compose.save(now).replace(
        "  solver: auto", "  solver: auto\n  statistics_interval: 1\n  refresh_above: 0.0"
    )
    older = re.sub(r"\n  refine: .*", r"\g<0>\n  extend: true", older)
    assert "extend" in older
    assert compose.parse(older) == now
    for text in ("statistics_interval: 2", "refresh_above: 0.5", "solver: warm"):
        key = text.partition(":")[0]
        with pytest.raises(ConfigError, match=f"^optim.{key}.* was removed"):
            compose.parse(re.sub(rf"\b{key}: .*", text, older))


def test_tuned_values_yield_to_the_command_line() -> None:
    tuned = OmegaConf.load(CONF / "tuned" / "c4_lm" / "sample_adamw.yaml").optim.lr
    assert tuned != AdamWConf().lr
    assert recipe("optim=adamw").optim.lr == tuned
    assert recipe("optim=adamw", "optim.lr=0.123").optim.lr == 0.123
    assert recipe("optim=adamw", "scale=paper").optim.lr == AdamWConf().lr  # tuned for another scale


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_steps=0", "trainer.max_steps should be at least 1 but is 0"),
        ("trainer.timeout=0", "trainer.timeout should be > 0 but is 0"),
        ("trainer.clip_norm=-1", "trainer.clip_norm should be > 0"),
        ("schedule.warmup=2", "schedule.warmup is a fraction of the run, 0 to 1, but is 2"),
        ("schedule.warmup=0.5", "schedule.warmup + schedule.decay should be at most 1 but is 1.45"),
        ("trainer.devices=5", "task.batch_size should be a multiple of trainer.devices x trainer.accumulate = 5"),
        ("trainer.strategy=fsdp", "trainer.strategy=fsdp divides the model among processes: add trainer.devices=N"),
        (
            "trainer.strategy=fsdp trainer.devices=2 trainer.compile=true",
            "trainer.strategy=fsdp with trainer.compile=true is not supported",
        ),
        (
            "trainer.strategy=fsdp trainer.devices=2 optim=muon",
            "optim=muon needs whole matrices, of which trainer.strategy=fsdp has rows",
        ),
        ("optim.lr=-1", "optim.lr should be >= 0 but is -1"),
        ("optim.eps=-1", "optim.eps should be > 0 but is -1.0"),
        ("optim.eps=nan", "optim.eps should be > 0 but is nan"),
        ("optim.order=1.5", "optim.order should be a positive integer or inf but is 1.5"),
        ("optim.order=1e9", "optim.order should be at most 100 but is 1000000000.0"),
        ("optim=shampoo optim.exponent=2", "optim.exponent should be one of 0, 0.25, 0.5, 1 but is 2.0"),
        ("optim=full_adagrad optim.betas=[0.9,1.5]", "optim.betas[1] should be in [0, 1) but is 1.5"),
        ("optim.betas=[0.9,1]", "optim.betas[1] should be below 1 for a moving average"),
        ("optim.factor_dtype=float32 optim.eps=1e-9", "optim.eps should be >= 1e-06 for float32 factors"),
        ("trainer.rendezvous=here", "trainer.rendezvous should be HOST:PORT but is 'here'"),
        ("trainer.rendezvous=host:99999", "trainer.rendezvous=host:99999: a port is a number from 1 to 65535"),
        ("trainer.rendezvous=host:0", "trainer.rendezvous=host:0: a port is a number from 1 to 65535"),
        ("trainer.max_steps=10000000000", "trainer.max_steps should be at most 1,000,000,000 but is 10000000000"),
        ("trainer.timeout=1e30", "trainer.timeout should be at most 10,000,000 but is 1e+30"),
        ("task.heads=0", "task.heads should be at least 1 but is 0"),
        ("task.dropout=1", "task.dropout should be in [0, 1) but is 1.0"),
        ("task.data=files task.root=''", "task.root is empty: name a directory"),
        ("optim.betas=[0.9]", "optim.betas should be two numbers but is [0.9]"),
        ("optim=adamw optim.betas=[0.9,0.9,0.9]", "optim.betas should be two numbers but is [0.9, 0.9, 0.9]"),
        ("optim=adamw optim.betas=[2,0]", "optim.betas[0] should be in [0, 1) but is 2.0"),
        ("optim=nadamw optim.eps=-1", "optim.eps should be >= 0 but is -1.0"),
        ("optim=sgd optim.momentum=0", "optim.momentum should be above 0 and below 1 but is 0.0"),
        ("optim=muon optim.momentum=1", "optim.momentum should be in [0, 1) but is 1.0"),
        ("optim=muon optim.ns_steps=0", "optim.ns_steps should be a positive integer but is 0"),
        ("optim=soap optim.interval=0", "optim.interval should be a positive integer but is 0"),
        ("task.batch_size=0", "task.batch_size should be at least 1 but is 0"),
        ("task.root=/data", "task.root=/data needs task.data=files, but task.data=sample"),
        ("task=ud_pos task.target.metric=val/loss", "task.target.metric=val/loss: less is better; add task.target"),
    ],
)
def test_values_that_types_cannot_refuse(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        recipe(*override.split())


def test_every_number_has_a_range() -> None:
    """A key that comes later has one, too."""
    apart = {"trainer.clip_norm", "schedule.warmup", "schedule.decay", "task.target.value", "trial"}
    for entry in registry.OPTIMIZERS.values():
        options = options_of(entry.keys).values()
        assert all(each.allowed for each in options if each.kind in ("int", "float", "tuple[float, float]"))
    for group, confs in (("task", CONFS), ("trainer", {"": TrainerConf})):
        for conf in confs.values():
            for f in fields(conf):
                key = f"{group}.{f.name}"
                if str(f.type).split(" | ")[0] in ("int", "float"):
                    assert key in {*LIMITS, *SHARES, *apart}, key


def test_text_that_no_file_can_hold_is_refused() -> None:
    for text in ("a\0b", "a\udcffb"):
        config = composed().copy()
        config.output_dir = text
        with pytest.raises(ConfigError, match="output_dir should be text in UTF-8 but is"):
            compose.freeze(config)


def test_own_data_have_neither_the_target_nor_the_rate_of_the_sample() -> None:
    adamw, own = "optim=adamw", ("task.data=files", "task.root=/somewhere")
    usual, tuned = AdamWConf(), recipe(adamw)
    assert tuned.optim.lr != usual.lr
    assert tuned.task.target.value is not None
    found = recipe(adamw, *own)
    assert compose.to_plain(found.optim) == compose.to_plain(usual)
    assert found.task.target.value is None
    assert found.task.target.metric == tuned.task.target.metric
    for words in (("task.target.value=3.5", "optim.lr=0.5", *own), (*own, "task.target.value=3.5", "optim.lr=0.5")):
        assert (recipe(*words).task.target.value, recipe(*words).optim.lr) == (3.5, 0.5)
    assert recipe("scale=paper", *own).task.target.value == recipe("scale=paper").task.target.value
    assert recipe(adamw, "task.data=sample") == tuned
