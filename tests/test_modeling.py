"""The published model as transformers loads it."""

import shutil

import numpy as np
import pytest
import torch
from published_models import make_picture, publish, write_backbone, write_kind

KINDS = ["dinov2", "dinov3", "lite0"]


@pytest.fixture(scope="module", params=KINDS)
def folders(request, tmp_path_factory):
    """A published folder and the folder of its backbone."""
    folder = tmp_path_factory.mktemp(request.param)
    backbone, width = write_kind(folder / "backbone", request.param)
    return publish(folder, backbone, width), backbone


@pytest.fixture(scope="module")
def published(folders):
    return folders[0]


@pytest.fixture(scope="module")
def model(published):
    return load(published)


@pytest.fixture(scope="module")
def pixels(published):
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(published)
    pictures = [make_picture(seed, (300, 280)) for seed in range(4)]
    return processor(images=pictures, return_tensors="pt")["pixel_values"]


@pytest.fixture(scope="module")
def expected(folders, model, pixels):
    """The backbone alone, loaded from its own folder, and the projector on top."""
    from transformers import AutoModel

    backbone = AutoModel.from_pretrained(folders[1]).eval()
    with torch.inference_mode():
        return model.projector(backbone(pixel_values=pixels).pooler_output.flatten(1))


def load(folder, **options):
    from transformers import AutoModel

    model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def embed(model, pixels, **options):
    with torch.inference_mode():
        return model(pixel_values=pixels, **options)


def cosines(found, expected):
    return (found.float() * expected).sum(dim=1)


def test_embeddings_are_those_of_backbone_and_projector(model, pixels, expected):
    outputs = embed(model, pixels)
    assert outputs.embeddings.shape == (4, 256)
    assert outputs.embeddings.dtype == torch.float32
    assert torch.allclose(outputs.embeddings, expected, atol=1e-6)
    assert torch.allclose(outputs.embeddings.norm(dim=1), torch.ones(4), atol=1e-6)


def test_the_first_field_is_the_embedding_and_the_tuple_is_for_the_asking(model, pixels):
    outputs = embed(model, pixels)
    assert next(iter(outputs)) == "embeddings"
    assert outputs[0] is outputs.embeddings
    assert torch.equal(outputs.pooler_output, outputs.embeddings)
    found = embed(model, pixels, return_dict=False)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], outputs.embeddings)


def test_the_backbone_keeps_its_own_buffers(folders, model):
    """Buffers that are not stored, such as DINOv3's rotary frequencies, are lost where loading starts from nothing."""
    from transformers import AutoModel

    backbone = AutoModel.from_pretrained(folders[1])
    found = dict(model.backbone.named_buffers())
    assert found.keys() == dict(backbone.named_buffers()).keys()
    for name, buffer in backbone.named_buffers():
        assert torch.equal(found[name], buffer), name


def test_configuration_and_parts_are_where_users_look_for_them(model, folders):
    assert model.config.backbone_model_name == "backbone"
    assert model.config.hidden_size == model.config.embedding_dim == 256
    assert type(model.backbone).__module__.startswith("transformers.")
    width = model.config.projector["input_dim"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = model.projector(torch.ones(2, width, dtype=dtype))
        assert (found.dtype, found.shape) == (torch.float32, (2, 256))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_type_asked_for_reaches_the_backbone_and_leaves_the_projector(published, pixels, expected, dtype):
    model = load(published, dtype=dtype)
    assert {parameter.dtype for parameter in model.backbone.parameters()} == {dtype}
    assert {parameter.dtype for parameter in model.projector.parameters()} == {torch.float32}
    found = embed(model, pixels).embeddings
    assert found.dtype == torch.float32
    assert cosines(found, expected).min() > 0.99


def test_a_type_in_the_nested_configuration_does_not_leave_the_backbone_behind(published, tmp_path):
    copy = shutil.copytree(published, tmp_path / "copy")
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace('"backbone_config": {', '"backbone_config": {"dtype": "float16",'))
    model = load(copy, dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_half_precision_of_a_loaded_model_works(published, pixels, expected):
    for change in ("half", "bfloat16"):
        found = embed(getattr(load(published), change)(), pixels).embeddings
        assert found.dtype == torch.float32
        assert cosines(found, expected).min() > 0.99


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_can_be_chosen(published, pixels, expected, implementation):
    model = load(published, attn_implementation=implementation)
    assert torch.allclose(embed(model, pixels).embeddings, expected, atol=1e-5)
    has_attention = model.config.backbone_config.model_type != "efficientnet"
    assert model.backbone.config._attn_implementation == (implementation if has_attention else "eager")


def test_saved_and_loaded_again_it_is_the_same(model, pixels, expected, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {
        "modeling_spatial_embeddings.py",
        "configuration_spatial_embeddings.py",
        "pooling.py",
        "projector.py",
    } <= names
    again = load(tmp_path / "saved")
    assert torch.allclose(embed(again, pixels).embeddings, expected, atol=1e-6)
    assert again.config.backbone_model_name == "backbone"


def test_an_image_is_embedded_the_same_in_any_batch(model, pixels):
    together = embed(model, pixels).embeddings
    alone = torch.cat([embed(model, pixels[index : index + 1]).embeddings for index in range(4)])
    assert cosines(alone, together).min() > 0.99999


def test_gradients_reach_the_pixels(model, pixels):
    inputs = pixels[:1].clone().requires_grad_()
    model(pixel_values=inputs).embeddings[0, 0].backward()
    assert inputs.grad.abs().sum() > 0
    model.zero_grad()


def test_the_pipeline_of_transformers_gives_the_embedding(published, model, pixels):
    from transformers import pipeline

    extract = pipeline("image-feature-extraction", model=str(published), trust_remote_code=True, device="cpu")
    found = np.array(extract(make_picture(0, (300, 280)))).ravel()
    assert found @ embed(model, pixels).embeddings[0].numpy() > 0.9999


def test_the_configuration_survives_a_round_trip(published, tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(published, trust_remote_code=True)
    config.save_pretrained(tmp_path)
    shutil.copy(published / "configuration_spatial_embeddings.py", tmp_path)
    again = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.backbone_config.to_dict() == config.backbone_config.to_dict()
    assert (again.projector, again.pooling_type) == (config.projector, config.pooling_type)


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_the_cls_token_is_taken_where_that_is_configured(kind, tmp_path):
    from transformers import AutoModel

    backbone = write_backbone(tmp_path / "backbone", kind)
    model = load(publish(tmp_path, backbone, pooling_type="cls_token"))
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tokens = AutoModel.from_pretrained(backbone).eval()(pixel_values=pixels).last_hidden_state
        assert torch.allclose(embed(model, pixels).embeddings, model.projector(tokens[:, 0]), atol=1e-6)


def test_it_is_built_without_memory_where_nothing_is_to_be_kept(published):
    """Loading begins on the meta device, so nothing in the constructors may need a value."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(published, trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_compiles_into_one_graph(model, pixels, expected, backend):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert cosines(embed(compiled, pixels).embeddings, expected).min() > 0.9999
    torch.compiler.reset()


def test_accelerate_can_place_it(published, pixels, expected):
    """Where it is not installed here, test_fresh_environment.py does this."""
    pytest.importorskip("accelerate")
    model = load(published, device_map="auto")
    assert torch.allclose(embed(model, pixels.to(model.device)).embeddings.cpu(), expected, atol=1e-5)


def test_no_backbone_configuration_names_a_place(published):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(published, trust_remote_code=True)
    assert config.backbone_config._name_or_path == ""
    assert not any("_name_or_path" in line for line in (published / "config.json").read_text().splitlines())


def test_saving_a_loaded_model_leaks_no_place(model, published, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "config.json").read_text()
    assert str(published) not in text
    assert str(published.parent) not in text
