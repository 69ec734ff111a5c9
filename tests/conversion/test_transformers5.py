"""The transformers of today: what it saves is read, what is exported it loads, and both compute the same.

All results of all families come from one process, whatever the number of tests (``tests/conversion/oracle.py``).
"""

import re
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moefoundry.config import UserError
from moefoundry.conversion import reference
from moefoundry.conversion.convert import export_hf, import_hf, load_hf, load_model
from moefoundry.conversion.families import FAMILIES, family_of
from moefoundry.conversion.hf_directory import read_hf_config
from moefoundry.evaluation.generation import complete, greedy
from moefoundry.model.transformer import MoETransformer
from tests.conversion.families.models import (
    CASES,
    OLDER,
    STANDS_IN,
    VARIANTS,
    assert_covered_once,
    blocks,
    our_tensors,
    sizes,
)
from tests.conversion.hf import (
    assert_same_tensors,
    change_config,
    contents,
    write_mxfp4,
)
from tests.conversion.oracle import MXFP4, PACKABLE, TEXTS, WRITERS, Peer, needs_oracle, run_peer, write_cases
from tests.conversion.transformers5 import LONG, NEW_TOKENS, PROMPT, sample

pytestmark = [pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"), needs_oracle]
ABSOLUTE = 3e-5  # of logits of about 1; 1e-5 is seen
RELATIVE = 2e-5  # of a gradient's largest entry; 4e-6 is seen
AMPLIFIED = {"qwen3_next": 10, "qwen3_5_moe_text": 10}  # roundings by a recurrence: 8e-5 and 4e-5 on an AMD EPYC
SPECIAL = re.compile(r"<\|?\w+\|?>")
NOT_FUSED = ("llama", "qwen2", "qwen3", "olmo2", "olmo3", "dbrx", "sarvam_moe", "bailing_moe")
FUSED = [family for family in VARIANTS if family not in NOT_FUSED]
cases = pytest.mark.parametrize(("family", "variant"), CASES, ids=["-".join(case) for case in CASES])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, kept_between_runs: Callable[[str], Path]) -> Peer:
    """What it saves, and makes of our configs, of experts in MXFP4 and of what is exported with a tokenizer."""
    directory = tmp_path_factory.mktemp("cases")
    write_cases(directory)
    return run_peer("compute", directory, kept_between_runs("oracle"))


def writer(saved: Peer, family: str, directory: Path) -> Path:
    """The checkpoint of a family that writes text."""
    import_hf(saved.path / f"{TEXTS}{family}", directory / family)
    return directory / family


@torch.no_grad()
def difference(logits: Tensor, expected: Tensor) -> float:
    assert expected.std() > 0.1, "there is something to compare"
    return (logits - expected).abs().max().item()


@cases
@torch.no_grad()
def test_what_it_saves_is_the_same_model_and_it_loads_what_is_exported(
    saved: Peer, tmp_path: Path, family: str, variant: str
) -> None:
    """By its config, its logits, and the tokens that it generates with a cache; and back, with every bit of every
    tensor, all of which it knows."""
    name = f"{family}-{variant}"
    config = read_hf_config(saved.path / name)
    there = family_of(config)
    assert there.name == STANDS_IN.get(family, family)
    assert there.read_config(config) == VARIANTS[family][variant]
    import_hf(saved.path / name, tmp_path / "checkpoint")
    model, expected = load_model(tmp_path / "checkpoint"), saved.results[name]
    tolerance = ABSOLUTE * AMPLIFIED.get(family, 1)
    found = difference(model(sample()), expected["logits"])
    print(f"{name}: logits differ by {found:.1e}")
    assert found < tolerance
    if "long" in expected:
        assert difference(model(sample(LONG)), expected["long"]) < tolerance
    if "tokens" in expected:
        assert greedy(model, sample()[0, :6], NEW_TOKENS).tolist() == expected["tokens"].tolist()
    export_hf(tmp_path / "checkpoint", tmp_path / "exported", family)
    unused = FAMILIES[family].unused_tensors(VARIANTS[family][variant])
    assert_same_tensors(tmp_path / "exported", saved.path / name, but=unused)
    under_its_name_there(tmp_path / "exported", family)
    assert read_hf_config(tmp_path / "exported") == read_hf_config(saved.path / f"{name}-ours")
    assert_it_loads(saved, name, {each for each, shape in unused.items() if 0 in shape})
    # Transformers 4.51 builds no queries without a rank, and has no windows in some blocks only.
    if family in OLDER and variant not in ("moonlight", "windows"):
        older = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", attn_implementation="eager").eval()
        assert difference(older(sample()).logits, expected["logits"]) < tolerance


def under_its_name_there(directory: Path, family: str) -> None:
    if family in STANDS_IN:
        change_config(directory, model_type=STANDS_IN[family])


def assert_it_loads(saved: Peer, name: str, empty: Collection[str]) -> None:
    """With the config that is exported: the same logits and tokens; tensors without elements may be missed."""
    result, expected = saved.results[f"{name}-ours"], saved.results[name]
    assert result["odd"].keys() <= {"missing_keys"}
    assert {*result["odd"].get("missing_keys", ())} <= {*empty}
    assert torch.equal(result["logits"], expected["logits"])
    if "tokens" in result:
        assert torch.equal(result["tokens"], expected["tokens"])


@cases
def test_loss_and_gradients_are_the_same_and_every_element_is_in_one_piece(
    saved: Peer, family: str, variant: str
) -> None:
    name, cfg = f"{family}-{variant}", VARIANTS[family][variant]
    theirs, pieces = contents(saved.path / f"{name}-gradients"), list(FAMILIES[family].pieces(cfg))
    known = {each: tensor for each, tensor in theirs.items() if each not in FAMILIES[family].unused_tensors(cfg)}
    assert_covered_once(pieces, our_tensors(MoETransformer(cfg)), known)
    ours = load_hf(saved.path / name)
    loss = ours(sample(), sample()).lm
    torch.testing.assert_close(loss.detach(), saved.results[name]["loss"], rtol=1e-5, atol=0)
    loss.backward()
    gradients = {each: tensor.grad for each, tensor in our_tensors(ours).items() if tensor.grad is not None}
    trained = (piece for piece in pieces if piece.name in gradients)
    for piece, our, their in blocks(trained, gradients, theirs):
        scale = gradients[piece.name].abs().max().item()
        assert scale > 0, piece
        atol = RELATIVE * scale * AMPLIFIED.get(family, 1)
        torch.testing.assert_close(our, their, rtol=0, atol=atol, msg=lambda text, p=piece: f"{p}: {text}")


@pytest.mark.parametrize("family", [family for family in VARIANTS if family not in {*OLDER, *STANDS_IN}])
def test_keys_left_out_have_its_defaults(saved: Peer, family: str) -> None:
    given = sizes(family, FAMILIES[family].write_config(VARIANTS[family]["plain"], 64))
    filled = saved.results["defaults"][family]
    assert len(filled) > len(given)
    read = FAMILIES[family].read_config
    assert read({"model_type": family, **given}) == read(filled)


@pytest.mark.parametrize("family", FUSED)
def test_experts_that_it_saves_fused_are_split_exactly(saved: Peer, tmp_path: Path, family: str) -> None:
    import_hf(saved.path / f"{family}-plain-fused", tmp_path / "imported")
    export_hf(tmp_path / "imported", tmp_path / "exported", family)
    assert_same_tensors(tmp_path / "exported", saved.path / f"{family}-plain")


@torch.no_grad()
def test_weights_in_mxfp4_are_read_as_it_reads_them(saved: Peer, tmp_path: Path) -> None:
    import_hf(saved.path / MXFP4, tmp_path / "imported")
    export_hf(tmp_path / "imported", tmp_path / "exported")
    tensors, published = contents(tmp_path / "exported"), contents(saved.path / MXFP4)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert_same_tensors(tmp_path / "exported", saved.path / MXFP4)
    assert tensors.keys() == published.keys()
    logits = load_model(tmp_path / "imported")(sample())
    assert difference(logits, saved.results[MXFP4]["logits"]) < ABSOLUTE


def test_it_writes_the_text_that_is_written_here(saved: Peer, tmp_path: Path) -> None:
    """As users call it, without the special tokens that random weights happen to write."""
    for family in WRITERS:
        model = load_model(writer(saved, family, tmp_path))
        text = complete(model, saved.path / f"{TEXTS}{family}", PROMPT, NEW_TOKENS)
        written = saved.results[f"{TEXTS}{family}"]["text"].removeprefix(PROMPT)
        assert text == f"{PROMPT}{SPECIAL.sub('', written)}", family


def test_tokenizers_that_it_saves_go_out_in_a_form_that_either_version_reads(saved: Peer, tmp_path: Path) -> None:
    tokenizer = saved.path / f"{TEXTS}mixtral/tokenizer5"
    assert "TokenizersBackend" in (tokenizer / "tokenizer_config.json").read_text()
    export_hf(writer(saved, "mixtral", tmp_path), tmp_path / "again", tokenizer=tokenizer)
    older = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    older_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
    inputs = older_tokenizer(PROMPT, return_tensors="pt")
    tokens = older.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert older_tokenizer.decode(tokens[0]) == saved.results[f"{TEXTS}mixtral"]["text"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v32", "hunyuan_v1_moe", "glm4_moe_lite", "ernie4_5_moe"])
def test_a_family_of_the_newer_version_is_verified(saved: Peer, tmp_path: Path, family: str) -> None:
    parity = import_hf(saved.path / f"{family}-plain", tmp_path / "checkpoint", tolerance=1e-4).parity
    assert parity is not None
    assert max(parity.logits, *parity.hidden) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next", "deepseek_v32", "bailing_moe", "ernie4_5_moe", "hy_v3"])
def test_a_large_model_of_the_newer_version_is_verified_block_by_block(
    saved: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr("moefoundry.conversion.convert.fits_twice", lambda _: False)
    tolerance = 1e-4 * AMPLIFIED.get(family, 1)
    parity = import_hf(saved.path / f"{family}-plain", tmp_path / "checkpoint", tolerance=tolerance).parity
    assert parity is not None
    assert parity.by_block
    assert parity.transformers.startswith("5.")
    assert max(parity.logits, *parity.hidden) < tolerance


@pytest.mark.slow
def test_what_only_the_newer_version_has_is_verified_by_it(
    saved: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parity = import_hf(saved.path / "minimax_m2-plain", tmp_path / "checkpoint", tolerance=1e-4).parity
    packed = write_mxfp4(tmp_path / "packed", PACKABLE)
    of_packed = import_hf(packed, tmp_path / "unpacked", tolerance=1e-4).parity
    assert parity is not None
    assert of_packed is not None
    assert of_packed.logits < 1e-4
    assert parity.transformers.startswith("5.")
    assert len(parity.hidden) == 2
    assert max(parity.logits, *parity.hidden) < 1e-4
    monkeypatch.setattr(reference, "newer_transformers", lambda: None)
    with pytest.raises(UserError, match=r"transformers 4\.\S+ has no minimax_m2; `make oracle` installs one that has"):
        import_hf(saved.path / "minimax_m2-plain", tmp_path / "other", tolerance=1e-4)
    assert not (tmp_path / "other").exists()
