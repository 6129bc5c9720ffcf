"""What SECURITY.md promises, where one can see it in the text of the package."""

import ast
import re
from pathlib import Path

import mgic

PACKAGE = Path(mgic.__file__).parent
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
NETWORK = {
    *("urllib", "urllib2", "urllib3", "requests", "httpx", "aiohttp", "http", "socket", "ssl", "ftplib", "smtplib"),
    *("telnetlib", "xmlrpc", "socketserver", "websockets", "paramiko", "boto3", "gdown", "wandb", "sentry_sdk"),
}
MAY_ASK_THE_HUB = {"publishing.py"}
"""Files that may import ``huggingface_hub``: `push` uploads, `from_pretrained` fetches; both on request."""
MAY_RUN_PROGRAMS = {"build.py", "records.py"}
"""Files that run a program: the C++ compiler, and ``git`` for the commit of a record. Lists of words, never a shell."""
MAY_IMPORT_BY_NAME = {"__init__.py", "paths.py", "points.py", "cases.py"}
"""Files that import a module whose name they hold: public names on first use, and extras."""
MAY_LOAD_LIBRARIES = {"build.py", "memory.py", "timing.py"}
"""Files that load a native library: the engine that was just compiled, and the C library."""


def files():
    return sorted(PACKAGE.rglob("*.py"))


def offences(text, name):
    """Lines of a file that could execute what a file says, or ask the network."""
    found = []
    for node in ast.walk(ast.parse(text)):
        imports = []
        if isinstance(node, ast.Import):
            imports = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imports = [node.module or ""]
        for module in imports:
            root = module.partition(".")[0]
            if root in NETWORK or (root == "huggingface_hub" and name not in MAY_ASK_THE_HUB):
                found.append(f"{node.lineno}: import {module}")
            if root == "subprocess" and name not in MAY_RUN_PROGRAMS:
                found.append(f"{node.lineno}: import {module}")
            if root in UNPICKLERS and not (root == "pickle" and isinstance(node, ast.Import)):
                found.append(f"{node.lineno}: import {module}")
        if not isinstance(node, ast.Call):
            continue
        called, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        root, last = called.partition(".")[0], called.rpartition(".")[2]
        if (
            called in {"eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"}
            or root in UNPICKLERS
            or (root == "yaml" and last in {"load", "load_all", "unsafe_load", "full_load", "unsafe_load_all"})
            or (root == "torch" and last == "load" and options.get("weights_only") != "True" and "export" not in called)
            or (last == "load" and root in {"np", "numpy"} and options.get("allow_pickle") != "False")
            or options.get("weights_only", "True") != "True"
            or options.get("allow_pickle", "False") != "False"
            or options.get("shell", "False") != "False"
            or called in {"os.system", "os.popen", "torch.jit.load", "torch.hub.load"}
            or (root == "ctypes" and last == "CDLL" and name not in MAY_LOAD_LIBRARIES)
            or last in {"load_state_dict_from_url", "download_url", "urlopen", "urlretrieve", "from_blob_url"}
            or (
                last == "import_module"
                and name not in MAY_IMPORT_BY_NAME
                and not isinstance(node.args[0], ast.Constant)
            )
        ):
            found.append(f"{node.lineno}: {called}")
    return found


def test_r5_the_package_neither_unpickles_nor_evaluates_text_nor_asks_the_network():
    found = {path.name: lines for path in files() if (lines := offences(path.read_text(encoding="utf-8"), path.name))}
    assert found == {}


def test_r5_the_reading_sees_every_way_it_is_meant_to_see(trials):
    bad = [
        *("eval(x)", "exec(x)", "compile(x, '', 'exec')", "__import__(x)", "pickle.loads(x)", "pickle.load(f)"),
        *("import dill", "from pickle import loads", "joblib.load(p)", "yaml.load(t)", "yaml.unsafe_load(t)"),
        *("torch.load(p)", "torch.load(p, weights_only=False)", "torch.load(p, weights_only=flag)"),
        *("np.load(p)", "np.load(p, allow_pickle=True)", "numpy.load(p)", "os.system(c)", "os.popen(c)"),
        *(
            "subprocess.run(c, shell=True)",
            "import subprocess",
            "import requests",
            "from urllib.request import urlopen",
        ),
        *("import socket", "import http.client", "from huggingface_hub import HfApi", "torch.hub.load(r, m)"),
        *("torch.jit.load(p)", "importlib.import_module(name)", "timm.load(p, weights_only=False)"),
    ]
    for line in bad:
        assert offences(line, "some.py"), line
        trials.passes()
    good = ["torch.load(p, weights_only=True)", "np.load(p, allow_pickle=False)", "yaml.safe_load(t)", "model.eval()"]
    assert not any(offences(line, "some.py") for line in good)


def test_r5_the_policy_names_rows_and_files_that_exist():
    text = (PACKAGE.parent / "SECURITY.md").read_text(encoding="utf-8")
    for place in re.findall(r"`(tests/\w+\.py)`", text):
        assert (PACKAGE.parent / place).is_file()
    table = (PACKAGE.parent / "benchmarks/faults.py").read_text(encoding="utf-8")
    for row in set(re.findall(r"\bR(\d+)\b", text)):
        assert f'"R{row}":' in table
