"""A command line composes the same config as by Hydra alone, and no values that are code."""

import os
import sys
import time
from pathlib import Path

import hydra
import pytest
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caspr_cli.recipe import compose, words
from caspr_cli.recipe.composer import UNTUNED, Composer
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Recipe

# ---- composed once, changed by values ------------------------------------------------------------------------------

CHOICES = st.lists(st.sampled_from(["optim=adamw", "optim=shampoo", "task=ud_pos", "scale=sample"]), max_size=2)
VALUES = st.lists(
    st.sampled_from([
        "seed=3", "seed=7", "optim.lr=0.01", "optim.lr=1", "optim.betas=[0.5,0.6]", "optim.betas.1=0.7",
        "optim.weight_decay=${optim.lr}", "task.target.value=null", "task.target={value:3.5}", "trainer.clip_norm=null",
        "trainer.max_steps=30", "task.width=64", "output_dir='a b, c=d'", "trainer.precision=bf16-mixed",
        "resume=never", "task.data=files", "task.root=some/where", "schedule.warmup=0",
        "schedule={warmup:0.25,decay:0.5}",
        "++optim.lr=0.25", "+trainer.workers=1", "++seed=11",
    ]),
    max_size=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer()


def recipe_or_why(config: DictConfig) -> Recipe | str:
    try:
        return compose.freeze(config)
    except ConfigError as error:
        return str(error)


@given(CHOICES, VALUES, st.randoms(use_true_random=False))
@settings(max_examples=8, deadline=None)
def test_as_hydra_composes_it(composer: Composer, choices: list[str], values: list[str], mixed: object) -> None:
    """Bit for bit: the config, the recipe, its name and its file; and where Hydra refuses, so do we."""
    given_words = [*choices, *values]
    mixed.shuffle(given_words)  # type: ignore[attr-defined]
    try:
        own = "task.data=files" in given_words and hydra.compose("train", choices).task.data.name == "sample"
        whole = hydra.compose("train", [*([UNTUNED, "task.target.value=null"] if own else []), *given_words])
    except HydraException:
        with pytest.raises((HydraException, OmegaConfBaseException)):
            composer.config(given_words)
        return
    config = composer.config(given_words)
    assert OmegaConf.to_yaml(config) == OmegaConf.to_yaml(whole)
    plain = OmegaConf.create(OmegaConf.to_container(whole, resolve=True))
    slow, fast = recipe_or_why(plain), recipe_or_why(config)  # the first is untyped: built anew from its values
    if isinstance(slow, str) or isinstance(fast, str):
        assert fast == slow
        return
    assert fast == slow
    assert compose.identity(fast) == compose.identity(slow)
    assert compose.save(fast) == compose.save(slow)
    structured = OmegaConf.to_container(OmegaConf.structured(slow), resolve=True, enum_to_str=True)
    assert compose.to_plain(fast) == structured


def test_a_sweep_over_seeds_is_composed_once(composer: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    once = hydra.compose

    def counted(*args: object, **more: object) -> DictConfig:
        calls.append(args)
        return once(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(hydra, "compose", counted)
    sweep = Composer(["optim=caspr,adamw", "seed=range(12)", "optim.lr=0.5"], sweeps=True)
    jobs = sweep.jobs()
    sweep.check(jobs)
    began = time.process_time()
    recipes = [compose.freeze(sweep.config(job), job) for job in jobs]
    assert (time.process_time() - began) / len(jobs) < 0.02
    assert len(calls) == 2
    assert len({recipe.seed for recipe in recipes}) == 12
    assert len({compose.identity(recipe) for recipe in recipes}) == 2


def test_a_value_that_is_wrong_is_found_before_any_job(composer: Composer) -> None:
    sweep = Composer(["seed=1,2", "optim.lr=1,abc"], sweeps=True)
    with pytest.raises(Exception, match="abc"):
        sweep.check(sweep.jobs())


def test_jobs_are_those_of_hydras_sweeper() -> None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given_words = ["optim=caspr,adamw", "seed=range(2)", "optim.betas=[0,1],[1,0]", "a='x, y','z'", "seed=5,6", "b=1"]
    Composer()
    hydras = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(given_words), None)
    assert words.split(given_words) == hydras[0]


# ---- a config chooses values, never code ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word",
    [
        "hydra=1", "~hydra", "+hydra.callbacks.x={_target_: os.system}", "hydra.job_logging.version=1",
        "hydra/job_logging=default", "hydra.hydra_logging={}", "hydra.job.env_set.PYTHONPATH=x", "hydra.job.chdir=true",
        "+hydra.job.env_copy=[HOME]", "hydra.searchpath=[pkg://this]", "hydra.run.dir=x", "hydra.sweep.dir=x",
        "hydra.output_subdir=x", "hydra/sweeper=basic", "hydra.sweeper.max_batch_size=1", "hydra.mode=MULTIRUN",
        "hydra/callbacks=x", "hydra/env=default", "+optim@hydra.job=caspr", "hydra.help.template=x", "++hydra.x=1",
    ],
)  # fmt: skip
def test_what_is_said_to_hydra_is_on_a_list(word: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be set: of Hydra's own keys only hydra/launcher"):
        Composer([word])


@pytest.mark.parametrize(
    ("given_words", "message"),
    [
        (["hydra.launcher={_target_:os.system}"], "hydra.launcher._target_=os.system is not an allowed launcher"),
        (["hydra/launcher=joblib", "hydra.launcher.pre_dispatch=x"], "hydra.launcher.pre_dispatch cannot be set"),
        (["hydra/launcher=joblib", "hydra.launcher.backend=x"], "hydra.launcher.backend cannot be set"),
        (["hydra/launcher=slurm", "hydra.launcher.setup=[touch x]"], "hydra.launcher.setup cannot be set"),
        (["hydra/launcher=slurm", "+hydra.launcher.srun_args=[x]"], "hydra.launcher.srun_args cannot be set"),
        (["hydra/launcher=slurm", "hydra.launcher.submitit_folder=x"], "hydra.launcher.submitit_folder cannot be set"),
        (["hydra/launcher=slurm", "+hydra.launcher.additional_parameters.export=X"], "parameters.export cannot be set"),
        (["hydra/launcher=slurm", "hydra.launcher.comment='a\nb'"], "should be one line of plain characters"),
        (["hydra/launcher=joblib,basic"], "jobs of one sweep cannot have different launchers"),
        (["hydra.verbose=[x]"], "hydra.verbose should be true or false"),
    ],
)  # fmt: skip
def test_a_launcher_is_given_numbers_and_names(given_words: list[str], message: str) -> None:
    pytest.importorskip("joblib")
    pytest.importorskip("submitit")
    with pytest.raises(ConfigError) as refused:
        Composer(given_words, sweeps=True).launcher([], "folder")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_launcher_of_ones_own_is_a_file(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    (tmp_path / "hydra" / "launcher").mkdir(parents=True)
    file = tmp_path / "hydra" / "launcher" / "ours.yaml"
    file.write_text("defaults: [slurm, _self_]\npartition: big\nadditional_parameters: {reservation: r}\n")
    sweep = Composer(["hydra/launcher=ours", "trainer.devices=4"], sweeps=True, place=str(tmp_path))
    found = sweep.launcher(["trainer.devices=4"], "the/folder")
    assert (found["partition"], found["gpus_per_node"], found["name"]) == ("big", 4, "caspr")
    assert found["submitit_folder"] == "the/folder/.submitit/%j"
    file.write_text("defaults: [slurm, _self_]\nsetup: [touch /tmp/x]\n")
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.setup cannot be set"):
        Composer(["hydra/launcher=ours"], sweeps=True, place=str(tmp_path)).launcher([], "folder")


# ---- files of the user ---------------------------------------------------------------------------------------------

G = "# @package _global_\n"
BOMB = G + "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)  # fmt: skip
BAD = {
    "bracket": (G + "optim: {lr: [1\n", "3: expected ',' or ']'"),
    "duplicate": (G + "optim:\n  lr: 1\n  lr: 2\n", "4: found duplicate key lr"),
    "tab": (G + "optim:\n\tlr: 1\n", "3: found character"),
    "control": (G + "output_dir: a\x01b\n", "2: special characters are not allowed"),
    "bytes": (G.encode() + b"seed: 1\noutput_dir: \xff\n", "3: not UTF-8"),
    "sequence": ("- a\n", "1: should hold keys"),
    "bomb": (BOMB, "5: holds more than 10,000 values"),
    "itself": (G + "a: &a [*a]\n", "2: holds more than 10,000 values"),
    "deep": (G + "a: " + "[" * 100_000, "2: nested more than 30 levels deep"),
    "tag": (
        G + "seed: 1\noutput_dir: !!python/object/apply:os.getcwd []\n",
        "3: !!python/object/apply:os.getcwd is not",
    ),
    "digits": (G + "seed: " + "9" * 6000 + "\n", "2: "),
    "open": (G + "seed: 1\noutput_dir: '${oc.env:X'\n", "3: "),
    "large": ("#" * (2**20 + 1), " is larger than 1 MB"),
    "loop": ("defaults: [other]\n", "other.yaml: these files include each other in their defaults"),
    "other": ("defaults: [loop]\n", "loop.yaml: these files include each other in their defaults"),
    "nested": ("defaults: [[a]]\n", "1: an entry of defaults should be"),
    "mapping": ("defaults: {a: b}\n", "1: defaults should be a list"),
    "number": ("defaults: [{a: 3}]\n", "1: an entry of defaults should be"),
    "header": ("# @package a b\n", "1: Too many components"),
    "job": (G + "seed: 1\nhydra: {job: {chdir: true}}\n", "3: hydra.job cannot be set"),
    "nothing": (G + "hydra: null\n", "2: hydra cannot be set"),
    "logging": ("# @package hydra.job_logging\nversion: 1\n", " hydra.job_logging cannot be set"),
    "choice": ("defaults: [override hydra/job_logging: default]\n", "1: hydra/job_logging cannot be set"),
    "package": ("defaults: [inner@hydra.job]\n", "1: hydra.job cannot be set"),
    "path": (G + "hydra: {searchpath: [pkg://this]}\n", "2: hydra.searchpath cannot be set"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "my").mkdir()
    for other in {name, "loop", "other"}:
        text = BAD[other][0]
        (tmp_path / "my" / f"{other}.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    began = time.process_time()
    with pytest.raises(ConfigError) as refused:
        Composer([f"+my={name}"], place=str(tmp_path)).config([f"+my={name}"])
    assert time.process_time() - began < 10
    assert str(refused.value).startswith(f"{tmp_path}/my/{name}.yaml")
    assert BAD[name][1] in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "this" not in sys.modules


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "my" / "folder.yaml").mkdir(parents=True)
    (tmp_path / "my" / "link.yaml").symlink_to("nowhere")
    os.mkfifo(tmp_path / "my" / "pipe.yaml")
    for name in ("folder", "link", "pipe"):
        with pytest.raises(ConfigError, match=rf"my/{name}\.yaml: is .* and should be a file of keys"):
            Composer([f"+my={name}"], place=str(tmp_path)).config([f"+my={name}"])


def test_what_reaches_hydra_by_another_way_is_seen(tmp_path: Path) -> None:
    """Whatever the files say, Hydra's part of the result is compared with that of no files."""
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "way.yaml").write_text("chdir: true\n")
    chosen = ["+my@_global_.hydra.job=way"]
    with pytest.raises(Exception, match=r"hydra\.job|_global_"):
        Composer(chosen, place=str(tmp_path)).config(chosen)


def test_an_optimizer_of_ours_comes_before_a_file_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "adamw.yaml").write_text("lr: 0.5\n")
    (tmp_path / "optim" / "mine.yaml").write_text("defaults: [caspr, _self_]\norder: 3\n")
    made = Composer(place=str(tmp_path))
    assert "name" in made.config(["optim=adamw"]).optim
    mine = compose.freeze(made.config(["optim=mine"])).optim
    assert (mine.name, vars(mine)["order"]) == ("caspr", 3)


def test_a_good_file_changes_values(tmp_path: Path) -> None:
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "good.yaml").write_bytes(
        b"\xef\xbb\xbf" + (G + "optim: {lr: 0.5}\n").replace("\n", "\r\n").encode()
    )
    chosen = ["+my=good", "seed=3"]
    recipe = compose.freeze(Composer(chosen, place=str(tmp_path)).config(chosen))
    assert (recipe.optim.lr, recipe.seed) == (0.5, 3)
