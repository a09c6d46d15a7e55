# SPDX-License-Identifier: Apache-2.0
"""The directions of imports (docs/architecture.md), and what may be imported at all."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "steadyvq"

# Each folder may import these others (and itself).
ALLOWED = {
    "kernels": set(),
    "quantizers": {"kernels"},
    "models": {"quantizers"},
    "interop": {"quantizers", "models"},
    "data": set(),
    "metrics": set(),
    "diagnosis": {"metrics"},
    "report": set(),
    "training": {"kernels", "quantizers", "models", "data", "metrics", "diagnosis", "report"},
    "generation": {"quantizers", "models", "data", "metrics", "report", "training"},
    "experiments": {
        "kernels",
        "quantizers",
        "models",
        "data",
        "metrics",
        "diagnosis",
        "report",
        "training",
        "generation",
    },
    "cli": {
        "kernels",
        "quantizers",
        "models",
        "interop",
        "data",
        "metrics",
        "diagnosis",
        "report",
        "training",
        "generation",
        "experiments",
    },
    "recipes": set(),
}
LIBRARY = ("kernels", "quantizers", "models", "interop", "diagnosis")
THIRD_PARTY = {
    "kernels": {"torch"},
    "quantizers": {"torch"},
    "models": {"torch", "safetensors"},
    "interop": {"torch", "safetensors"},
    "diagnosis": {"torch"},
}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {
                f"{node.module}.{alias.name}" if node.module == "steadyvq" else node.module for alias in node.names
            }
    return found


def test_every_folder_is_listed():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert folders == set(ALLOWED)


@pytest.mark.parametrize("folder", ALLOWED)
def test_directions(folder):
    for file in (PACKAGE / folder).rglob("*.py"):
        used = {name.split(".")[1] for name in imports(file) if name.startswith("steadyvq.")}
        used &= set(ALLOWED)
        assert used <= ALLOWED[folder] | {folder}, f"{file.name} of {folder} imports {used - ALLOWED[folder]}"


@pytest.mark.parametrize("folder", LIBRARY)
def test_the_library_half_needs_torch_and_safetensors_alone(folder):
    for file in (PACKAGE / folder).rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(file)} - set(sys.stdlib_module_names) - {"steadyvq"}
        if file.name.startswith("device_") and file.parent.name == "triton":
            roots -= {"triton"}  # loaded when a kernel is launched on a card, and never by an import
        assert roots <= THIRD_PARTY[folder], f"{file} imports {roots}"


def test_models_know_quantizers_by_their_base_alone():
    """A Tokenizer receives a quantizer; only `from_pretrained` asks the registry for one, by name."""
    for file in (PACKAGE / "models").rglob("*.py"):
        used = {name for name in imports(file) if name.startswith("steadyvq.quantizers")}
        assert used <= {"steadyvq.quantizers.base", "steadyvq.quantizers"}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_and_help_are_cheap():
    assert not loaded_by("import steadyvq") & {"torch", "numpy", "PIL"}
    assert not loaded_by("import steadyvq.cli; steadyvq.cli.build_parser().format_help()") & {"torch", "numpy", "rich"}


def test_the_four_lines_load_no_training_library():
    heavy = {"PIL", "yaml", "rich", "lightning_fabric", "torchmetrics", "jaxtyping", "mvtbdata"}
    assert "triton" not in loaded_by("import torch, steadyvq.kernels.triton") - loaded_by("import torch")
    assert not loaded_by("import steadyvq; steadyvq.build_quantizer('nsvq', num_codes=8, dim=4)") & heavy


def test_using_a_tokenizer_loads_no_launcher_of_processes():
    """They take longer to import than torch, and every `eval`, `encode`, `decode` and refusal would wait for them."""
    assert not loaded_by("import steadyvq.cli.use, steadyvq.training.tokenizer_task") & {
        "lightning_fabric",
        "torchmetrics",
    }


def test_every_file_names_its_licence():
    for file in [*PACKAGE.rglob("*.py"), *Path(__file__).parent.rglob("*.py")]:
        assert file.read_text().startswith("# SPDX-License-Identifier: Apache-2.0"), file
