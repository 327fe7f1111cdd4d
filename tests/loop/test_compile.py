"""torch.compile around the trained module: one graph, compiled once, for every family; and a cache that outlives the process.

The graphs of all families are captured and differentiated as for training, but run as they are (`aot_eager`): inductor takes
minutes for a UNet on a CPU. What it makes of the smallest model is tested too.
"""

import functools
from pathlib import Path

import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from engine.config.options import TrainConfig
from engine.loop.trainer import train
from tests.loop.runs import SLACK
from tests.loop.test_families import config, losses

CASES = [(family, checkpointing) for family in ("sd", "kandinsky-prior", "kandinsky-decoder", "wuerstchen")
         for checkpointing in (False, True) if not (family == "kandinsky-prior" and checkpointing)]  # fmt: skip


@pytest.fixture(scope="module")
def plain(model, published, photographs, tmp_path_factory):
    """family -> the options of its runs, and the losses of one that is not compiled; once for each family."""

    @functools.cache
    def trained(family: str) -> tuple[dict, list[float]]:
        directory = tmp_path_factory.mktemp(family)
        options = {
            "shards_dir": str(directory / "shards"), "output_dir": str(directory / "plain"), "max_train_steps": 2,
            "gradient_accumulation_steps": 2, "train_data_dir": str(photographs),
        }  # fmt: skip
        if family == "sd":
            options |= {"family": "sd", "pretrained_model_name_or_path": str(model), "resolution": 32, "seed": 5}
            options |= {"train_batch_size": 4, "log_every": 1, "report_to": "none", "center_crop": True}
        else:
            made = config(family, published(family, dropout=0.0), photographs, directory / "plain")
            options = made.model_dump(exclude_unset=True) | options
        assert train(TrainConfig.model_validate(options)) == 0
        return options, losses(directory / "plain")

    return trained


@pytest.mark.parametrize(("family", "checkpointing"), CASES)
def test_every_family_compiles_once_into_one_graph(family, checkpointing, plain, tmp_path, monkeypatch):
    options, expected = plain(family)
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, options: compile_module(module, backend="aot_eager"))
    options = options | {"output_dir": str(tmp_path / "compiled"), "compile": True}
    if checkpointing:
        options["gradient_checkpointing"] = True
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert train(TrainConfig.model_validate(options)) == 0
    assert losses(tmp_path / "compiled") == pytest.approx(expected, rel=1e-4 * SLACK)
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_a_compiled_model_trains_as_the_plain_one_and_again_from_its_cache(published, photographs, tmp_path, monkeypatch):
    models = published("kandinsky-prior")
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, "")  # what the runs set is undone with it
    cached = {"compile": True, "compile_cache_dir": str(tmp_path / "cache")}
    code = {}
    for name, options in (("plain", {}), ("compiled", cached), ("again", cached)):
        torch._dynamo.reset()
        counters.clear()
        options = {"shards_dir": str(tmp_path / "shards"), "max_train_steps": 3, **options}
        # Without vectors the C++ compiler needs half the time.
        with torch._inductor.config.patch({"cpp.simdlen": 1}):
            assert train(config("kandinsky-prior", models, photographs, tmp_path / name, **options)) == 0
        code[name] = {path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".cpp", ".py", ".so")}
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4 * SLACK)
    assert losses(tmp_path / "again") == losses(tmp_path / "compiled")
    assert code["plain"] == set()
    assert code["again"] == code["compiled"] != set(), "a restart compiled again"
    exported = [load_file(path / "prior" / "diffusion_pytorch_model.safetensors").keys() for path in
                (tmp_path / "compiled", Path(models["pretrained_prior_model_name_or_path"]))]  # fmt: skip
    assert exported[0] == exported[1]
