"""Our reading of an adapter against PEFT's own: the delta of every module of a real (tiny, random) llama."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from registry.artifact.gate import Accepted
from tests.artifact.cases import ACCEPTED, BARE
from tests.artifact.judge import judge
from tests.generate import BASE_NAME, TINY_CONFIG, GeneratedAdapter, decode

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def build_model() -> torch.nn.Module:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY_CONFIG))
    model.name_or_path = BASE_NAME
    return model


def deltas_of_peft(adapter: GeneratedAdapter, folder: Path) -> dict[str, np.ndarray]:
    """Module path -> delta weight, as PEFT loads the folder."""
    model = build_model()
    model = model.model if adapter.prefix == BARE else model
    loaded = peft.PeftModel.from_pretrained(model, str(adapter.write(folder)))
    modules = loaded.base_model.model.named_modules()
    found = {name: module for name, module in modules if isinstance(module, peft.tuners.lora.LoraLayer)}
    return {name: module.get_delta_weight("default").detach().numpy() for name, module in found.items()}


def deltas_of_ours(accepted: Accepted, weights: bytes) -> dict[str, np.ndarray]:
    data = weights[accepted.header.data_start :]
    deltas = {}
    for pair in accepted.layout.pairs:
        a, b = (decode(data[t.start : t.end], accepted.layout.dtype).reshape(t.shape) for t in (pair.a, pair.b))
        module = pair.a.name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        deltas[module] = np.float32(pair.scale) * (b @ a)
    return deltas


# "missing adapter keys" is not ignored: PEFT must load all that we take.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
@pytest.mark.parametrize("adapter", ACCEPTED.values(), ids=ACCEPTED)
def test_deltas_are_peft_s(adapter: GeneratedAdapter, tmp_path: Path) -> None:
    accepted, _ = judge(adapter.files)
    ours, theirs = deltas_of_ours(accepted, adapter.weights_bytes), deltas_of_peft(adapter, tmp_path)
    assert ours.keys() == theirs.keys()
    for module, delta in ours.items():
        np.testing.assert_allclose(delta, theirs[module], rtol=1e-5, atol=1e-7, err_msg=module)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saves_is_taken(rslora: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        use_rslora=rslora,
        target_modules="all-linear",
        rank_pattern={"q_proj": 6},
        alpha_pattern={r"layers\.1\..*up_proj": 3},
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    model = peft.get_peft_model(build_model(), config)
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)  # else it asks the hub about the vocabulary
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    accepted, _ = judge(files)
    ours = deltas_of_ours(accepted, files["adapter_model.safetensors"])
    modules = {name: module for name, module in model.base_model.model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert ours.keys() == modules.keys()
    for name, module in modules.items():
        np.testing.assert_allclose(ours[name], module.get_delta_weight("default").detach().numpy(), rtol=1e-5, atol=1e-7)
