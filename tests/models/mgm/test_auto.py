"""`import cal_train` makes the Auto classes know MGM, and costs nothing by itself."""

import subprocess
import sys

import pytest
import torch
from transformers import CLIPVisionConfig, ConvNextConfig, LlamaConfig

from cal_train.data.conversation import load_template
from cal_train.models import mgm_family
from cal_train.models.mgm.modeling import MGMForConditionalGeneration
from cal_train.testing import tiny_processor, tiny_tokenizer

LOAD = """
import sys
{imports}
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder, backend="pil")
assert type(AutoProcessor.from_pretrained(folder)) is type(processor)
assert type(processor).__name__ == "MGMProcessor" and type(processor.image_processor).__name__ == "MGMImageProcessor"
assert processor.num_image_tokens == 20
assert type(AutoConfig.from_pretrained(folder)).__name__ == "MGMConfig"
assert type(AutoModel.from_pretrained(folder)).__name__ == "MGMModel"
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "what is in the image?"}}]}}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
assert text == open(sys.argv[3]).read(), text
from PIL import Image
image = Image.linear_gradient("L").convert("RGB")
batch = processor(text=text, images=[image], return_tensors="pt")
with torch.no_grad():
    torch.save(model(**batch).logits, sys.argv[2])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mgm_hd")
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    aux = ConvNextConfig(**mgm_family.TINY_AUX)
    image_token_id = tokenizer.get_vocab()["<image>"]
    config = mgm_family.build_config(text, vision, image_token_id, -2, aux, **mgm_family.TINY_HD)
    processor = mgm_family.build_processor(
        config, tiny_processor(tokenizer).image_processor, tokenizer, load_template("vicuna_v1")
    )
    MGMForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def expected(folder):
    """Logits and rendered text of the same input, by the classes themselves."""
    from PIL import Image

    from cal_train.models.mgm.processing import MGMProcessor

    processor = MGMProcessor.from_pretrained(folder, backend="pil")
    messages = [{"role": "user", "content": "<image>\nwhat is in the image?"}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    image = Image.linear_gradient("L").convert("RGB")
    batch = processor(text=text, images=[image], return_tensors="pt")
    with torch.no_grad():
        return text, MGMForConditionalGeneration.from_pretrained(folder).eval()(**batch).logits


def load_in_fresh_process(folder, tmp_path, imports):
    text, logits = expected(folder)
    (tmp_path / "text.txt").write_text(text)
    arguments = [str(folder), str(tmp_path / "logits.pt"), str(tmp_path / "text.txt")]
    subprocess.run([sys.executable, "-c", LOAD.format(imports=imports), *arguments], check=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits)


def test_auto_classes_load_the_folder_in_a_fresh_process(folder, tmp_path):
    load_in_fresh_process(folder, tmp_path, "import cal_train")


# modeling_layers imports an Auto class while it is itself half imported, the others in their own order
@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import transformers.modeling_layers, cal_train",
        "import cal_train, transformers.modeling_layers",
        "import cal_train\nfrom transformers import Trainer",
        "import cal_train\nfrom transformers import LlamaForCausalLM, LlavaForConditionalGeneration",
        "import cal_train\nfrom transformers import LlavaForConditionalGeneration",
        "import cal_train\nfrom transformers import LlavaNextForConditionalGeneration",
        "import cal_train\nfrom transformers import LlavaProcessor, LlavaImageProcessor, LlavaImageProcessorPil",
        "import cal_train.models.llava",
        "import cal_train\nfrom transformers import AutoProcessor",
        "import cal_train.models.mgm.modeling",
        "from transformers import AutoProcessor, AutoModelForImageTextToText\nimport cal_train",
    ],
)
def test_the_order_of_imports_does_not_matter(folder, tmp_path, imports):
    load_in_fresh_process(folder, tmp_path, imports)


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = "import cal_train, sys; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
