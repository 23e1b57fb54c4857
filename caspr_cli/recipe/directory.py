"""Config files of other packages and of the user (``-cd DIR``): read as values, and refused with file and line."""

import os
from collections.abc import Iterator
from typing import ClassVar, NoReturn, cast

import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caspr_cli.common import plugins
from caspr_cli.optim.registry import OPTIMIZERS
from caspr_cli.recipe import settings
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.tasks.registry import TASKS

LARGEST = 2**20  # bytes of a file
DEEPEST = 30  # levels of brackets and indentation
MOST = 10_000  # values of a file, counting those that its anchors repeat
# Choices that Hydra would look for after the files of the user.
OURS = {f"optim/{name}.yaml" for name in OPTIMIZERS} | {f"task/{name}.yaml" for name in TASKS}
PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp",
                                                  "merge")}  # fmt: skip


def use(directory: str | None) -> None:
    """Let Hydra look for configs in ours, in other packages', then in this directory. Raises ConfigError if unread."""
    for plugin in (Files, Lookup):
        Plugins.instance().register(plugin)
    Lookup.directories, Files.loaded = [str(folder) for folder in plugins.folders()], []
    if directory is not None:
        try:
            os.listdir(directory)
        except OSError as error:
            raise ConfigError(f"-cd {directory}: {error.strerror}") from error
        Lookup.directories.append(os.path.abspath(directory))


class Lookup(SearchPathPlugin):
    directories: ClassVar[list[str]] = []

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for directory in self.directories:
            search_path.append("command-line", f"{Files.scheme()}://{directory}")


class Files(ConfigSource):
    loaded: ClassVar[list[str]] = []

    @staticmethod
    def scheme() -> str:
        return "user"

    def _file(self, config_path: str) -> str:
        return os.path.join(self.path, self._normalize_file_name(config_path))

    def load_config(self, config_path: str) -> ConfigResult:
        file = self._file(config_path)
        self.loaded.append(file)
        text = _text(file)
        try:
            header = self._get_header_dict(text)
        except ValueError as error:
            raise ConfigError(f"{file}:1: {error}") from error
        _refuse_hydra(f"{file}: ", config_path, header["package"] or "")
        return ConfigResult(self.provider, self.full_path(), _config(file, text), header)

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return os.path.isdir(os.path.join(self.path, config_path))

    def is_config(self, config_path: str) -> bool:
        if self._normalize_file_name(config_path) in OURS:
            return False
        file = self._file(config_path)
        if os.path.lexists(file) and not os.path.isfile(file):
            what = "a directory" if os.path.isdir(file) else "no file (a broken link, a pipe or a device)"
            raise ConfigError(f"{file}: is {what}, and should be a file of keys")
        return os.path.isfile(file)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        found = []
        with os.scandir(os.path.join(self.path, config_path)) as entries:
            for entry in entries:
                if entry.is_dir() and results_filter != ObjectType.CONFIG:
                    found.append(entry.name)
                elif entry.is_file() and entry.name.endswith(".yaml") and results_filter != ObjectType.GROUP:
                    found.append(entry.name.removesuffix(".yaml"))
        return sorted(found)


def _text(file: str) -> str:
    try:
        with open(file, "rb") as opened:
            content = opened.read(LARGEST + 1)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    if len(content) > LARGEST:
        raise ConfigError(f"{file}: is larger than {LARGEST // 2**20} MB, no config")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _refuse(file, content.count(b"\n", 0, error.start), f"not UTF-8 ({error.reason})")


def _config(file: str, text: str) -> DictConfig:
    """Return the content of a file, checked. Raises ConfigError, which names the file and the line."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                _refuse(file, event.start_mark.line, f"nested more than {DEEPEST} levels deep")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return OmegaConf.create()
        if not isinstance(root, yaml.MappingNode):
            _refuse(file, root.start_mark.line, "should hold keys, as in optim: {lr: 0.01}")
        _count(file, root, {})
        for key, value in root.value:
            if key.value == "hydra":
                _check_hydra(file, value, "hydra")
            elif key.value == "defaults":
                _check_defaults(file, value)
        return cast(DictConfig, OmegaConf.create(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        _refuse(file, mark.line if mark else 0, " ".join(str(error.problem or error.context).split()))
    except yaml.reader.ReaderError as error:
        _refuse(file, text.count("\n", 0, error.position), f"{error.reason} (#x{ord(text[error.position]):x})")
    except (OmegaConfBaseException, ValueError) as error:
        _refuse(file, _culprit(root), str(error).splitlines()[0])


def _refuse_hydra(where: str, *places: str) -> None:
    """Refuse places of Hydra's own that are not allowed."""
    for place in places:
        if f"{place}/".startswith(("hydra/", "hydra.")):
            settings.refuse(place, where)


def _refuse(file: str, line: int, why: str) -> NoReturn:
    raise ConfigError(f"{file}:{line + 1}: {why}")


def _inner(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _count(file: str, node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values a node holds with its anchors expanded. Refuse too many, and those that are not plain."""
    if node.tag not in PLAIN:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        _refuse(file, node.start_mark.line, f"{tag} is not allowed: a config holds plain values")
    if id(node) not in known:
        known[id(node)] = MOST + 1  # for an anchor that contains itself
        known[id(node)] = 1 + sum(_count(file, each, known) for each in _inner(node))
    if known[id(node)] > MOST:
        _refuse(file, node.start_mark.line, f"holds more than {MOST:,} values (anchors that repeat each other)")
    return known[id(node)]


def _check_hydra(file: str, node: yaml.Node, key: str) -> None:
    """Refuse what a file may not say to Hydra itself."""
    if key in ("hydra", "hydra.sweeper") and isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            _check_hydra(file, value, f"{key}.{name.value}")
    else:
        settings.refuse(key, f"{file}:{node.start_mark.line + 1}: ")


def _check_defaults(file: str, node: yaml.Node) -> None:
    """Check a defaults list, whose entries are ``name``, ``group: name`` or ``group: [name, ...]``."""
    if not isinstance(node, yaml.SequenceNode):
        _refuse(file, node.start_mark.line, "defaults should be a list, as in [_self_, optim: caspr]")
    for entry in node.value:
        group, names = entry, list[yaml.Node]()
        if isinstance(entry, yaml.MappingNode) and len(entry.value) == 1:
            group, chosen = entry.value[0]
            names = chosen.value if isinstance(chosen, yaml.SequenceNode) else [chosen]
        if not _is(group, "str") or not all(_is(name, "str", "null") for name in names):
            _refuse(file, entry.start_mark.line, "an entry of defaults should be a name or one group: name")
        path, _, package = group.value.split(" ")[-1].lstrip("/").partition("@")
        _refuse_hydra(f"{file}:{entry.start_mark.line + 1}: ", path, package)


def _is(node: yaml.Node, *kinds: str) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag.rpartition(":")[2] in kinds


def _culprit(node: yaml.Node) -> int:
    """Return the line of the first value that OmegaConf refuses: an interpolation without an end, a huge number."""
    for each in _inner(node):
        if isinstance(each, yaml.ScalarNode):
            try:
                OmegaConf.create({"value": each.value if each.style else yaml.safe_load(each.value)})
            except (OmegaConfBaseException, ValueError, yaml.YAMLError):
                return int(each.start_mark.line)
        elif line := _culprit(each):
            return line
    return 0
