import argparse
import json
import re

import torch
import transformers
from transformers import AutoModelForCausalLM, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from cal_train.cli import compose, env, merge
from cal_train.models.lora import add_lora
from cal_train.testing import tiny_llava, tiny_tokenizer, write_tiny_vlm
from cal_train.train.provenance import environment


def run(verb, *options):
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.run(parser.parse_args([str(option) for option in options]))


def test_compose_writes_a_folder_and_names_the_next_command(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    CLIPVisionModel(CLIPVisionConfig(image_size=28, patch_size=14, **sizes)).save_pretrained(tmp_path / "tower")
    CLIPImageProcessorPil(crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path / "tower")
    parts = ("--llm", tmp_path / "llm", "--vision_tower", tmp_path / "tower")
    assert run(compose, "--family", "llava", *parts, "--image_aspect_ratio", "pad", "--output", tmp_path / "vlm") == 0
    assert (tmp_path / "vlm" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "vlm" / "processor_config.json").read_text())["image_processor"]["do_pad"] is True
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"--model_name_or_path {tmp_path / 'vlm'}")


def test_merge_writes_a_plain_folder(tmp_path, capsys):
    base = write_tiny_vlm(tmp_path / "base")
    model = add_lora(type(tiny_llava()).from_pretrained(base), r=2, alpha=4, dropout=0.0)
    model.save_pretrained(tmp_path / "adapter")
    assert run(merge, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged") == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert str(tmp_path / "merged") in capsys.readouterr().out


def test_env_prints_the_versions_in_use(capsys):
    assert run(env) == 0
    printed = capsys.readouterr().out
    assert f"  torch: {torch.__version__.split('+')[0]}" in printed
    assert f"  transformers: {transformers.__version__}" in printed
    assert "lmms_eval: " in printed


def test_environment_is_plain_json_with_a_commit_and_memory():
    facts = environment()
    assert json.loads(json.dumps(facts)) == facts
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", facts["git_commit"])
    assert facts["memory_gib"] > 0.1 and facts["num_cpus"] >= 1
