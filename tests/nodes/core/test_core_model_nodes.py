"""Every node of ComfyUI's that takes a MODEL, with ours: the same as with its own model, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from core_nodes import CoreNode, latents_of, model_nodes, write_files
from core_sampling import TwoModels
from wan_pack.demo.comfyui import comfyui_folder

LIMIT = 1e-4
SAME, REFUSED, FAILS = "same", "refused by name", "fails as with ComfyUI's own model"
TABLE = {
    SAME: """
        KSampler KSamplerAdvanced SamplerCustom CFGGuider DualCFGGuider BasicGuider PerpNeg PerpNegGuider
        BasicScheduler BetaSamplingScheduler SDTurboScheduler SamplingPercentToSigma SamplerSASolver AddNoise
        ModelSamplingSD3 ModelSamplingAuraFlow ModelSamplingFlux ModelSamplingLTXV ModelSamplingDiscrete
        ModelSamplingContinuousEDM ModelSamplingContinuousV ModelSamplingStableCascade
        APG CFGNorm CFGZeroStar Epsilon_Scaling FreSca LatentApplyOperationCFG Mahiro RescaleCFG TCFG
        TemporalScoreRescaling VideoLinearCFGGuidance VideoTriangleCFGGuidance
        ContextWindowsManual WanContextWindowsManual EasyCache LazyCache DifferentialDiffusion
        LoraLoader LoraLoaderModelOnly LoraModelLoader wanBlockSwap ChromaRadianceOptions
    """,
    REFUSED: """
        CheckpointSave ImageOnlyCheckpointSave LoraSave ModelSave TrainLoraNode ModelComputeDtype TorchCompileModel
        ModelMergeAdd ModelMergeBlocks ModelMergeSimple ModelMergeSubtract ModelMergeAuraflow ModelMergeCosmos14B
        ModelMergeCosmos7B ModelMergeCosmosPredict2_14B ModelMergeCosmosPredict2_2B ModelMergeFlux1 ModelMergeLTXV
        ModelMergeMochiPreview ModelMergeQwenImage ModelMergeSD1 ModelMergeSD2 ModelMergeSD35_Large ModelMergeSD3_2B
        ModelMergeSDXL ModelMergeWAN2_1
        HyperTile HypernetworkLoader PatchModelAddDownscale PerturbedAttentionGuidance QwenImageDiffsynthControlnet
        ScaleROPE SelfAttentionGuidance SkipLayerGuidanceDiT SkipLayerGuidanceDiTSimple SkipLayerGuidanceSD3
        TomePatchModel UNetCrossAttentionMultiply UNetSelfAttentionMultiply UNetTemporalAttentionMultiply
        USOStyleReference
    """,
    FAILS: "FreeU FreeU_V2 RenormCFG",
}
"""What becomes of each; with values other than the defaults where those are neutral."""


def made(two: TwoModels, node: CoreNode, model: Any) -> Any:
    try:
        return [latents_of(two.core, output) for output in node.call(two.core, model)]
    except Exception as error:
        return error


def outcome(two: TwoModels, node: CoreNode) -> str:
    ours = made(two, node, two.ours)
    if isinstance(ours, ValueError) and "load" in str(ours) and "with Load Diffusion Model" in str(ours):
        return REFUSED
    theirs = made(two, node, two.theirs)
    if isinstance(ours, Exception) or isinstance(theirs, Exception):
        return FAILS if repr(ours) == repr(theirs) else f"{ours!r}, and with ComfyUI's own {theirs!r}"
    pairs = [pair for pair in zip(ours, theirs, strict=True) if pair != (None, None)]
    errors = [float((one - other).abs().max() / other.abs().max()) for one, other in pairs]
    return SAME if all(error < LIMIT for error in errors) else f"differs by {errors}"


def remember_sigmas(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand are computed one by one, for each model anew."""
    compute, known = kind.sigma, {}

    def sigma(self: Any, timestep: Any) -> Any:
        if not isinstance(timestep, float):
            return compute(self, timestep)
        key = self.shift, timestep
        if key not in known:
            known[key] = compute(self, timestep)
        return known[key]

    monkeypatch.setattr(kind, "sigma", sigma)


def test_what_becomes_of_each_node(t2v: TwoModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember_sigmas(t2v.core["comfy.model_sampling"].StableCascadeSampling, monkeypatch)
    write_files(t2v.core, tmp_path)
    expected = {name.replace("_S", " S"): outcome for outcome, names in TABLE.items() for name in names.split()}
    found = {node.name: outcome(t2v, node) for node in model_nodes(t2v.core, comfyui_folder())}
    # Of nodes that only newer ones have no list is kept; what they do must be one of the three all the same.
    new = {name: what for name, what in found.items() if name not in expected and what in TABLE}
    assert {name: what for name, what in found.items() if (expected | new).get(name) != what} == {}
    assert expected.keys() <= found.keys()
    assert not list(tmp_path.rglob("*.safetensors.tmp")) and not list((tmp_path / "output").rglob("*ComfyUI*"))
