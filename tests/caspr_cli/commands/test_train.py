import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from calling import Call
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from caspr_cli.commands import topics, train
from caspr_cli.recipe.schema import OPTIMIZERS
from caspr_cli.runs.session import Session
from caspr_cli.runs.sweep import EXTRAS, Job


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """No run is started: an attempt fails."""
    monkeypatch.setattr("caspr_cli.runs.launch._supervise", Mock(side_effect=AssertionError("a run was started")))
    monkeypatch.setattr("caspr_cli.runs.here.has_gpu", lambda: False)
    return Call("caspr-train", train.main, monkeypatch, capsys)


def test_each_topic_is_listed_and_shown(call: Call) -> None:
    assert call("help") == 0
    listed = [line.split()[2] for line in call.out.splitlines()[1:]]
    assert listed == sorted(file.stem for file in topics.FOLDER.iterdir())
    for name in listed:
        assert call("help", name) == 0
        text = (topics.FOLDER / f"{name}.md").read_text()
        assert call.out == text.replace(topics.DEFAULTS, topics.defaults())
    assert call("help", "job") == 2
    assert "Did you mean jobs?" in call.err


def test_the_help_on_tuning_has_the_values_that_optimizers_come_with() -> None:
    assert topics.DEFAULTS in (topics.FOLDER / "tuning.md").read_text()
    rows = topics.defaults().splitlines()
    assert len(rows) == len(OPTIMIZERS) + 2
    assert "| `caspr` | 0.02 | 0.9, 0.99 | - | 0 | 10 |" in rows
    assert "| `sgd` | 0.1 | - | 0.9 | 0 | - |" in rows


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["optim.lrr=1"], "optim.lrr is not a key of optim=caspr. Did you mean optim.lr?"),
        (["+optim.lrr=1"], "optim.lrr is not a key of optim=caspr. Did you mean optim.lr?"),
        (["optim=adamw", "optim.order=1"], "optim.order is not a key of optim=adamw."),
        (["plan=true"], "plan is not a key. plan=true goes with experiment=NAME; debug=plan shows what one run does"),
        (["-m", "optim=caspr,adamw", "optim.order=1"], "optim.order is not a key of optim=adamw."),
        (
            ["experiment=ud_pos", "optim=caspr,sgd", "optim.order=1", "plan=true"],
            "optim.order is not a key of optim=sgd. (keys: caspr-train optim=sgd --cfg job --package optim)",
        ),
        (
            ["experiment=damping", "++seed=0,1"],
            "++seed=0,1: with experiment=NAME give keys as key=value alone, without +",
        ),
        (["trainer.max_step=3"], "trainer.max_step is not a key of trainer. Did you mean trainer.max_steps?"),
        (["optmi=caspr"], "optmi is not a key. Did you mean optim?"),
        (["optim.lr=abc"], "optim.lr should be a number but is 'abc'"),
        (["optim.betas=0.9"], "optim.betas should be a list in brackets, as in optim.betas=[0.9,0.99]"),
        (["optim.learning_rate=1e-3"], "optim.learning_rate is not a key of optim=caspr. Did you mean optim.lr?"),
        (["optim.beta2=0.9"], "optim.beta2 is not a key of optim=caspr. Did you mean optim.betas?"),
        (["task.lr=1"], "task.lr is not a key of task=c4_lm. Did you mean optim.lr?"),
        (["epochs=3"], "epochs is not a key. Did you mean trainer.max_steps?"),
        (["optim=sgd", "beta1=0.9"], "beta1 is not a key. (keys: caspr-train --cfg job)"),
        (
            ["-m", "task=c4_lm", "hydra/launcher=joblib", "hydra.launcher.n_job=2"],
            "hydra.launcher.n_job is not a key of hydra.launcher. Did you mean hydra.launcher.n_jobs? "
            "(keys: caspr-train hydra/launcher=joblib --cfg hydra --package hydra.launcher)",
        ),
        (["output_dir=${oc.env:NOPE}"], "output_dir=${oc.env:NOPE}: environment variable 'NOPE' not found"),
        (["seed=0-4"], "seed should be an integer but is '0-4': for 0 to 4 write -m seed='range(0,5)'"),
        (["-m", "search=lr", "trial=0:5"], "but is '0:5': for 0 to 5 write -m trial='range(0,6)'"),
        (["optim=lion"], "optim=lion: no such choice. (A package may bring it: caspr-train new optimizer NAME)"),
        (["optim=SGD"], "optim=SGD: no such choice. Did you mean optim=sgd?"),
        (["task="], "task=: no such choice. (A package may bring it: caspr-train new task NAME)"),
        (["task=imagenet"], "task=imagenet: no such choice. (A package may bring it: caspr-train new task NAME)"),
        (["task.data=files"], "task.root: task.data=files needs the directory of your data: add task.root=DIR"),
        (["task.data=files", "task.root=/nowhere"], "task.root: no such directory: /nowhere"),
        (["trainer.accelerator=gpu"], "trainer.accelerator=gpu: this machine has no GPU; leave it out, or take cpu"),
        (["trainer.nodes=2"], "trainer.nodes=2 needs trainer.rendezvous=HOST:PORT"),
        (["seed=1.5"], "seed should be an integer but is '1.5'"),
        (["trainer.compile=perhaps"], "trainer.compile should be true or false but is 'perhaps'"),
        (["optim=casper"], "optim=casper: no such choice. Did you mean optim=caspr?"),
        (["scale=papers"], "scale=papers: no such choice. Did you mean scale=paper?"),
        (["optim.graft=adma"], "Did you mean optim.graft=adam?"),
        (["seed=1,2"], "seed=1,2 is a sweep: add -m"),
        (["optim.betas=0.9,0.95"], "optim.betas=0.9,0.95: a list stands in brackets: 'optim.betas=[0.9,0.95]'"),
        (["-m", "logger=csv,wandb"], "logger=csv,wandb: a list stands in brackets: 'logger=[csv,wandb]'"),
        (["logger=csv"], "logger should be a list in brackets, as in logger=[csv]"),
        (["--mutlirun"], "--mutlirun is not a flag. Did you mean --multirun?"),
        (["--lr=3"], "--lr=3 is not a flag: keys are written key=value"),
        (["lr=3"], "lr is not a key. Did you mean optim.lr?"),
        (["seed", "3"], "cannot read 'seed': a word is key=value, as in seed=1 (caspr-train --help)"),
        (["seed=[0,1]"], "seed should be an integer but is '[0, 1]': for each of them write -m seed=0,1"),
        (
            ["schedule=cosine"],
            "schedule=cosine: schedule has keys of its own. Did you mean schedule.name=cosine? (keys: ",
        ),
        (["seed=="], "cannot read 'seed=='"),
        (["output_dir=~/runs"], "cannot read 'output_dir=~/runs': a word is key=value; quote a value"),
        (["task=null"], "task=null: no such choice. (choices: c4_lm, ogbg_molpcba"),
        (["optim.name=sgd"], "optim.name=sgd: choose with optim=sgd"),
        (["optim.lr=inf"], "optim.lr should be a finite number but is inf"),
        (["seed=99999999999999999999999"], "seed should be at most 9,223,372,036,854,775,807 but is"),
        (["output_dir="], "output_dir is empty"),
        (["output_dir=/proc/nothing"], "output_dir=/proc/nothing: cannot write there: "),
        (["experiment=molpcba", "output_dir=/proc/nothing"], "output_dir=/proc/nothing: cannot write there: "),
        (["search=lr", "trial=best", "output_dir=nowhere"], "6 of 6 trials of optim=caspr have not ended in nowhere"),
        (["trial=best"], "trial=best needs a search: add search=NAME (choices: algoperf, joint, lr, lr_wide, paper)"),
        (["experiment=dampin"], "experiment=dampin: no such choice. Did you mean experiment=damping?"),
        (["experiment=damping", "-m"], "-m: with experiment=NAME give keys as key=value alone"),
        (["experiment=damping", "trial=3"], "an experiment runs all of its trials; search.trials=N says how many"),
        (["experiment=damping", "scale=papr"], "scale=papr: experiment=damping has sample, paper. Did you"),
        (["experiment=damping", "plan=maybe"], "plan should be true or false but is 'maybe'"),
        (["experiment=damping", "debug=plan"], "debug=plan is for a single run; for an experiment use plan=true"),
        (["experiment=damping", "hydra/launcher=jobli"], "hydra/launcher=jobli: no such choice. Did you mean"),
        (["experiment=damping", "search.trials=0"], "search.trials should be at least 1 but is 0"),
        (["experiment=damping", "seed=x"], "seed=1,2,3 or seed='range(1,6)', but is 'x'"),
        (["experiment=damping", "seed=0,1"], "seed 0 chooses among the trials, and what chose is not to be reported"),
        (["experiment=damping", "output_dir=a,b"], "output_dir=a,b: give one value, as all rows share it (quote"),
        (["experiment=damping,typo"], "experiment=typo: no such choice."),
        (["experiment=damping", "optim.lr=0.1"], "search=lr has nothing to draw: you set optim.lr; or use search=none"),
        (["experiment=damping", "optim.lrr=3", "plan=true"], "optim.lrr is not a key of optim=caspr_sum."),
        (["+hydra.callbacks.x={_target_: torch.hub.load}"], "hydra.callbacks.x cannot be set: of Hydra's own keys"),
        (["-m", "seed=range(0)"], "a sweep over no value: there is nothing to run"),
        (["-m", "optim=caspr,foo"], "optim=foo: no such choice."),
        (["=3"], "cannot read '=3': a word is key=value"),
        (["-m", "seed=interval(1,2)"], "seed=interval(1,2): a sweep is over values, as in seed=1,2 or seed=range(3)"),
        (["-m", "seed=range(1000000000)"], "a sweep of 10,001 jobs or more; at most 10,000 fit into one"),
        (["hydra/launcher=slurm"], "hydra/launcher=slurm says how the jobs of a sweep run: add -m"),
        (["-m", "--cfg", "job"], "one of -m, -r, --cfg, --info and -sc at a time"),
        (["-cd", "/nowhere"], "-cd /nowhere: No such file or directory"),
        (["-cn", "../x"], "-cn ../x: should be the name of a file in the directory of -cd"),
        (["experiment=damping", "search.trials=1,2"], "search.trials=1,2: give one value"),
        (["experiment=damping", "optim=range(0)"], "experiment=damping: a key has no value"),
        (["experiment=damping", "seed=range(0)"], "seed=range(0): no seed, so that there is nothing to run"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_mistakes(argv: list[str], message: str, call: Call) -> None:
    assert call(*argv) == 2
    assert message in call.err
    assert call.err.startswith("error: ")
    assert len(call.err.splitlines()) <= 3
    assert "Traceback" not in call.err + call.out
    assert "HYDRA_FULL_ERROR" not in call.err


OWN = {
    "c4_lm": ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "a.jsonl:2: has no text; a record is a string, or an object"),
    "ud_pos": ("a.conllu", "1\tone\n", "a.conllu:1: 2 columns, not 10 with one tab between each"),
    "ogbg_molpcba": ("a.csv", "smiles,y\nC,1\nxyz,0\n", "a.csv:3: 'xyz' is no SMILES of a molecule"),
    "vit": ("cat/1.png", "no image", "data: one class alone (cat), there is nothing to tell apart"),
}


@pytest.mark.parametrize("task", OWN)
def test_own_data_are_refused_before_torch_is_imported(task: str, tmp_path: Path) -> None:
    name, text, message = OWN[task]
    file = tmp_path / "data" / name
    file.parent.mkdir(parents=True)
    file.write_text(text)
    root = file.parent.parent if task == "vit" else file if name.endswith((".conllu", ".csv")) else file.parent
    words = [f"task={task}", "task.data=files", f"task.root={root}", *["task.images=folder"] * (task == "vit")]
    start = "import sys; from caspr_cli.commands import scripts; sys.modules['torch'] = None; sys.exit(scripts.train())"
    done = subprocess.run(
        [sys.executable, "-c", start, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr.startswith(f"error: {message}"), done.stdout + done.stderr
    assert done.returncode == 2
    assert "importing torch" not in done.stdout
    assert not (tmp_path / "outputs").exists()


def test_a_launcher_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    Plugins.instance()  # which fills the store
    for name, extra in EXTRAS.items():
        monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], f"{name}.yaml", raising=False)
        assert call("-m", f"hydra/launcher={name}", "seed=0,1") == 2
        wanted = f"error: hydra/launcher={name} is not installed: pip install 'caspr-cli[{extra}]'\n"
        assert call.err == wanted


def test_a_sweep_refused_as_a_whole_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("-m", "optim=adamw", "optim.lr=1e-3,abc") == 2
    assert call.err == "error: optim.lr should be a number but is 'abc'\n"
    assert not list(tmp_path.glob("outputs/.sweep/[0-9]*"))


def test_a_sweep_whose_jobs_are_all_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("-m", "trainer.max_steps=0,-1") == 3
    assert call.err.count("error: trainer.max_steps should be at least 1") == 2
    assert "sweep    2 jobs: 2 refused" in call.out


def test_sigterm_between_two_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    """It came while no run was there to receive it, and ended the command without a word."""
    before = signal.getsignal(signal.SIGTERM)

    def first(_: Session, __: object, job: Job) -> Job:
        os.kill(os.getpid(), signal.SIGTERM)
        return job

    monkeypatch.setattr(Session, "run", first)
    monkeypatch.setenv("CASPR_CACHE", str(tmp_path))
    monkeypatch.setattr("caspr_cli.commands.train.seconds", lambda *_: 1.0)
    words = ["experiment=c4_14m", "optim=adamw", f"output_dir={tmp_path}"]
    assert call(*words) == 143
    goes_on = f"next     caspr-train {' '.join(words)}"
    assert call.out.splitlines()[-2:] == ["stopped  the same command goes on:", goes_on]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_ctrl_c_before_the_first_job(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    if launcher != "basic":
        pytest.importorskip(launcher)
    monkeypatch.chdir(tmp_path)
    where = "session.Session.run" if launcher == "basic" else "elsewhere.launch"
    monkeypatch.setattr(f"caspr_cli.runs.{where}", Mock(side_effect=KeyboardInterrupt))
    assert call("-m", f"hydra/launcher={launcher}", "seed=0,1") == 130
    assert not list(tmp_path.glob("outputs/.sweep/[0-9]*"))


def test_a_config_file_cannot_choose_code(tmp_path: Path, call: Call) -> None:
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "x.yaml").write_text(
        "# @package _global_\nhydra: {callbacks: {x: {_target_: builtins.print, values: ran}}}\n"
    )
    assert call("--config-dir", str(tmp_path), "+evil=x") == 2
    assert f"{tmp_path}/evil/x.yaml:2: hydra.callbacks cannot be set" in call.err
    assert "ran" not in call.out


def test_a_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for argv in (["seed=1"], ["-m", "seed=1,2"], ["experiment=damping", "plan=true"], ["--cfg", "job"]):
        assert call(*argv) == 2
        assert "error: the working directory cannot be used" in call.err


def test_flags_may_come_last() -> None:
    flags = train.flags_of(["optim=sgd", "--cfg", "job", "-p", "optim", "seed=1"])
    assert (flags.words, flags.cfg, flags.package) == (["optim=sgd", "seed=1"], "job", "optim")


@pytest.mark.parametrize("argv", [["--cfg", "job"], ["--help"], ["-sc", "query=bash"]])
def test_answers_without_torch(argv: list[str]) -> None:
    """Composition, help and tab completion must not wait seconds for an import they do not need."""
    code = (
        "import sys, atexit\n"
        f"sys.argv = ['caspr-train', *{argv!r}]\n"
        "from caspr_cli.commands import train\n"
        "try: code = train.main()\n"
        "except SystemExit as e: code = e.code\n"
        "heavy = {'torch', 'lightning', 'torchvision', 'numpy'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy), file=sys.stderr)\n"
    )
    environment = {"COMP_LINE": "caspr-train optim=", "COMP_POINT": "18", "PATH": "/usr/bin"}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment, timeout=60
    )
    assert time.perf_counter() - start < 30  # a hang, not a benchmark
    assert "heavy: []" in done.stderr
    if argv[0] == "-sc":
        assert "optim=caspr" in done.stdout
