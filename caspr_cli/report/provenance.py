"""Where a run came from, in words; empty where its record does not say."""

import hashlib

from caspr_cli.common.format import count
from caspr_cli.report.model import Run

NO_DIFF = hashlib.sha256(b"").hexdigest()[:16]


def command(run: Run) -> list[str]:
    return list(map(str, run.provenance.get("command") or ()))


def hardware(run: Run) -> str:
    """Return the GPU, or else the processor, with the numbers of processes and threads."""
    device = run.provenance.get("device") or {}
    processor = (run.provenance.get("machine") or {}).get("processor")
    name = device.get("name") if device.get("type") != "cpu" else processor or "cpu"
    processes, threads = (int(device.get(key) or 1) for key in ("processes", "threads"))
    return f"{name}, {count(processes, 'process', 'es')}, {count(threads, 'thread')}" if device else ""


def products(run: Run) -> str:
    """Return the type of the optimizer's products after ``hardware``, as ", products in bfloat16"."""
    found = (run.provenance.get("device") or {}).get("products")
    return f", products in {found}" if found else ""


def machine(run: Run) -> str:
    found = run.provenance.get("machine") or {}
    cores = f"{found['cores']} cores" if found.get("cores") else ""
    return ", ".join(filter(None, [found.get("processor"), cores, found.get("system")]))


def versions(run: Run) -> str:
    own = {"caspr-cli": run.provenance.get("caspr_cli"), "python": run.provenance.get("python")}
    packages = own | (run.provenance.get("packages") or {})
    return ", ".join(f"{name} {version}" for name, version in packages.items() if version)


def code(run: Run) -> str:
    """Return the commit, and a hash of what was changed; without one, the version."""
    found, version = run.provenance.get("code"), run.provenance.get("caspr_cli")
    if not found:
        return f"version {version}" if version else ""
    commit, diff = str(found.get("commit"))[:8], found.get("diff_sha256")
    return commit if diff in (None, NO_DIFF) else f"{commit} with changes {str(diff)[:8]}"


def data(run: Run) -> str:
    found = run.provenance.get("data") or {}
    return f"{found.get('name')} ({found.get('source')}), hash {found.get('hash')}" if found else ""


def data_hash(run: Run) -> str | None:
    return (run.provenance.get("data") or {}).get("hash")
