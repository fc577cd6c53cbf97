"""The published model with a quantised backbone: the projector stays in float32, and the embeddings stay right.

bitsandbytes (with accelerate) and torchao do this on a CPU too; a test skips where its library is not there.
"""

import warnings

import pytest
import torch
from published_models import make_picture, publish, write_kind

from pipeline.retrieval.projector import Projector

# bitsandbytes cuts weights into blocks of 64.
SHAPE = {"hidden_size": 64, "num_attention_heads": 4}


@pytest.fixture(scope="module", params=["dinov2", "dinov3", "lite0"])
def published(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    shape = SHAPE | ({"intermediate_size": 128} if request.param == "dinov3" else {})
    return publish(folder, *write_kind(folder / "backbone", request.param, **shape))


@pytest.fixture(scope="module")
def pixels(published):
    from transformers import AutoImageProcessor

    pictures = [make_picture(seed, (300, 280)) for seed in range(4)]
    return AutoImageProcessor.from_pretrained(published)(images=pictures, return_tensors="pt")["pixel_values"]


@pytest.fixture(scope="module")
def expected(published, pixels):
    return embed(load(published), pixels)


def load(folder, **options):
    from transformers import AutoModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the quantisers' own, of what torch will rename
        return AutoModel.from_pretrained(folder, trust_remote_code=True, **options).eval()


def embed(model, pixels):
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(pixel_values=pixels).embeddings


def check(model, pixels, expected, least):
    """The projector is untouched, the backbone's layers are not (a convolutional one has none), the values are near."""
    assert {parameter.dtype for parameter in model.projector.parameters()} == {torch.float32}
    assert {type(parameter) for parameter in model.projector.parameters()} == {torch.nn.Parameter}
    layers = [module for module in model.backbone.modules() if type(module) is torch.nn.Linear]
    assert not [layer for layer in layers if type(layer.weight) is torch.nn.Parameter]
    found = embed(model, pixels)
    assert found.dtype == torch.float32
    assert torch.allclose(found.norm(dim=1), torch.ones(4), atol=1e-5)
    assert (found * expected).sum(dim=1).min() >= least


# Four bits of random weights: measured 0.992 to 0.998 (nf4) and 0.986 to 0.995 (fp4); 0 would be chance.
@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"load_in_8bit": True}, 0.99),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 0.98),
        ({"load_in_4bit": True}, 0.97),
        ({"load_in_8bit": True, "llm_int8_skip_modules": ["embeddings"]}, 0.99),
    ],
)
def test_bitsandbytes_quantises_the_backbone_alone(published, pixels, expected, settings, least):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from transformers import BitsAndBytesConfig

    model = load(published, quantization_config=BitsAndBytesConfig(**settings))
    check(model, pixels, expected, least)


def test_a_model_in_eight_bits_can_be_saved_and_loaded_again(published, pixels, expected, tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from transformers import BitsAndBytesConfig

    load(published, quantization_config=BitsAndBytesConfig(load_in_8bit=True)).save_pretrained(tmp_path / "saved")
    check(load(tmp_path / "saved"), pixels, expected, 0.99)


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.parametrize("while_loading", [True, False])
def test_torchao_quantises_the_backbone_alone(published, pixels, expected, kind, while_loading):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    settings = getattr(quantization, kind)()
    if while_loading:
        model = load(published, quantization_config=TorchAoConfig(settings))
    else:
        model = load(published)
        quantization.quantize_(model, settings)
    check(model, pixels, expected, 0.99)


def test_dynamic_quantisation_of_torch_leaves_the_projector_alone(published, pixels, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(load(published), {torch.nn.Linear}, dtype=torch.qint8)
    check(model, pixels, expected, 0.99)


def test_quantisers_are_told_to_leave_the_projector_alone(published):
    """By the list that they read, and because none of its layers is of the class that they look for."""
    from transformers.quantizers.base import HfQuantizer

    model = load(published)
    assert "projector" in HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    assert not [module for module in model.projector.modules() if isinstance(module, torch.nn.Linear)]


def test_the_module_that_reads_the_pixels_is_named_whatever_the_backbone(published):
    model = load(published)
    module = model.get_input_embeddings()
    assert any(module is inner for inner in model.backbone.modules())
    weights = [parameter for parameter in module.parameters() if parameter.ndim == 4]
    assert weights[0].shape[1] == 3  # a convolution that takes red, green and blue


def test_a_projector_starts_with_the_same_numbers_as_layers_of_torch():
    torch.manual_seed(3)
    projector = Projector(6, 4, 5, 1)
    torch.manual_seed(3)
    layers = [torch.nn.Linear(6, 4), torch.nn.Linear(6, 5)]
    assert torch.equal(projector.shortcut.weight, layers[0].weight)
    assert torch.equal(projector.hidden[0].bias, layers[1].bias)
