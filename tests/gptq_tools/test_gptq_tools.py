"""What we write is read by AutoGPTQ 0.7.1 and GPTQModel 7.7.0, with equal outputs."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import qwen_jax
from convert import gptq, to_hf
from qwen_jax.quantise.algorithm import Order, Scheme
from tests.gptq_tools import folders
from tests.gptq_tools.folders import Layer
from tests.support.gptq import GPTQ

QUANTISED = {
    "4 bits": Scheme(bits=4, group_size=64),
    "8 bits, whole columns": Scheme(bits=8, group_size=-1),
    "asymmetric": Scheme(bits=4, symmetric=False),
    "asymmetric, v1": Scheme(bits=4, symmetric=False),
    "asymmetric, 8 bits": Scheme(bits=8, group_size=32, symmetric=False),
    "act-order": Scheme(bits=4, order=Order.IMPORTANCE),
    "group-aware": Scheme(bits=4, order=Order.GROUPS),
}
CONVERTED = {
    "from 4 bits": {"bits": 4, "group": 64},
    "from 8 bits": {"bits": 8, "group": 32},
    "from asymmetric, v1": {"bits": 4, "group": 128, "sym": False, "lowest": 1},
    "from asymmetric, v1, with zeros of 0": {"bits": 4, "group": 128, "sym": False},
    "from act-order, v1": {"bits": 8, "group": 64, "act": True, "sym": False, "lowest": 1},
    "from v2, no biases": {"bits": 4, "group": 128, "v2": True, "biases": False},
    "from act-order, v2": {"bits": 4, "group": 16, "act": True, "sym": False, "v2": True},
}
# GPTQModel leaves a folder of its own to Python's end.
pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")
LOGITS = 2e-5  # of the largest logit: roundings of float32 in three blocks


@pytest.fixture(scope="module", params=[*QUANTISED, *CONVERTED])
def written(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that we wrote."""
    path = tmp_path_factory.mktemp("folder")
    if scheme := QUANTISED.get(request.param):
        options = ("--zeros", "v1") if "v1" in request.param else ()
        return folders.quantised(path, scheme, *options)
    return folders.converted(path, **CONVERTED[request.param])


@pytest.fixture(scope="module")
def layers(written: Path) -> dict[str, Layer]:
    """Its linear layers."""
    found = folders.layers(written)
    assert len(found) == 15
    return found


def auto_gptq(layer: Layer, said: dict[str, Any]) -> torch.nn.Module:
    """The layer in the class that AutoGPTQ takes for such settings, without an accelerator.

    The class is loaded from its file, as the package itself imports a transformers of its time.
    """
    (package,) = importlib.util.find_spec("auto_gptq").submodule_search_locations
    name = "qlinear_cuda" if said["desc_act"] and said["group_size"] != -1 else "qlinear_cuda_old"
    file = Path(package) / "nn_modules" / "qlinear" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.QuantLinear(
        said["bits"],
        said["group_size"],
        len(layer.tensors["g_idx"]),
        layer.tensors["scales"].shape[1],
        bias="bias" in layer.tensors,
        weight_dtype=torch.float32,
    )
    return loaded(made, layer)


def gptqmodel(layer: Layer, said: dict[str, Any]) -> torch.nn.Module:
    """The layer in GPTQModel's class for any device, loaded as its loader does."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    bits = said["bits"]
    made = TorchLinear(
        bits=bits,
        group_size=said["group_size"],
        sym=said["sym"],
        desc_act=said["desc_act"],
        in_features=len(layer.tensors["g_idx"]),
        out_features=layer.tensors["scales"].shape[1],
        bias="bias" in layer.tensors,
    )
    loaded(made, layer)
    if said.get("checkpoint_format", "gptq") == "gptq":
        convert_gptq_v1_to_v2_format_module(made, bits=bits, pack_dtype=torch.int32)
    made.post_init()
    return made.float().eval()


def loaded(made: torch.nn.Module, layer: Layer) -> torch.nn.Module:
    """The module with the tensors of a layer, each of which has its name, shape and dtype."""
    made.load_state_dict({key: torch.from_numpy(array) for key, array in layer.tensors.items()})
    return made


def excess(made: torch.nn.Module, layer: Layer) -> float:
    """How far the module's output is from ours, in bounds."""
    with torch.no_grad():
        got = made(torch.from_numpy(layer.x)).numpy()
    assert got.dtype == np.float32
    return float((np.abs(got - layer.output) / layer.bound).max())


def test_layers_in_gptqmodel(written: Path, layers: dict[str, Layer]) -> None:
    said = folders.settings(written)
    for name, layer in layers.items():
        assert excess(gptqmodel(layer, said), layer) <= 1, name


def test_layers_in_auto_gptq(written: Path, layers: dict[str, Layer]) -> None:
    """Right but for asymmetric zeros of v2, and for v1 where one is 0.

    It passes over `checkpoint_format`, and adds 1 to each zero of a word, where GPTQModel adds to
    the word.
    """
    said = folders.settings(written)
    v1 = said.get("checkpoint_format", "gptq") == "gptq"
    for name, layer in layers.items():
        words = layer.tensors["qzeros"].view(np.uint32)
        read = v1 and gptq.zeros_of(words, bits=said["bits"], convention="v1").all()
        found = excess(auto_gptq(layer, said), layer)
        assert found <= 1 if read else found > 10, name


@pytest.mark.parametrize("written", [x for x in QUANTISED if "v1" not in x], indirect=True)
def test_whole_folders_in_gptqmodel(written: Path, layers: dict[str, Layer]) -> None:
    """Under the names of Qwen2, for which it needs no code of the folder."""
    from gptqmodel import BACKEND, GPTQModel

    model, folder = written.with_name("model"), written.with_name("qwen2")
    assert to_hf.main([str(model), str(folder), "--as", "qwen2"]) == 0
    theirs = GPTQModel.load(
        str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16
    )
    theirs.model.float()
    ours = qwen_jax.load(model, "float32", attention="xla")
    tokens = load_file(GPTQ / "model.safetensors")["tokens"][None]
    with torch.no_grad():
        got = theirs.model(input_ids=torch.tensor(tokens).long()).logits.numpy()
    wanted = np.asarray(ours.logits(tokens))
    assert np.abs(got - wanted).max() / np.abs(wanted).max() < LOGITS
