"""What the documents name exists: files, make targets, verbs."""

import re
from pathlib import Path

from cal_train.cli.main import VERBS

ROOT = Path(__file__).parents[1]
FOLDERS = ("recipes", "data", "zero_configs", "benchmarks", "eval")
DOCUMENTS = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
NOTES = [*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "data").glob("*.yaml")]
COMMENTED = [*NOTES, ROOT / "Makefile", ROOT / ".ci" / "run"]


def code_of(text: str) -> list[str]:
    """Return fenced blocks and inline code, so that "make sure" in a sentence is not taken for a command."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*fenced, *re.findall(r"`([^`\n]+)`", rest)]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def verbs_named(text: str) -> list[str]:
    return re.findall(r"(?:\bcal-train|-m cal_train)\s+(?:\\\s+#?\s*)?([a-z_]+)\b", text)


def test_relative_links_lead_to_files():
    num_links = 0
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if re.match(r"[a-z]+:", target):
                continue
            num_links += 1
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}, which does not exist"
    assert num_links >= 10, f"only {num_links} links seen"


def test_named_make_targets_exist():
    targets = make_targets()
    assert {"demo", "demo-long", "test", "test-all", "lint", "bench", "clean", "help"} <= targets
    for path in [*DOCUMENTS, ROOT / ".ci" / "run"]:
        text = path.read_text(encoding="utf-8")
        pieces = code_of(text) if path.suffix == ".md" else [text]
        for target in re.findall(r"(?:^|\bexec )make ([a-z][a-z-]*)", "\n".join(pieces), re.MULTILINE):
            assert target in targets, f"{path.relative_to(ROOT)} names `make {target}`: no such target"


def test_every_make_target_is_explained():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    explained = set(re.findall(r"^([a-z][a-z-]*):.*## \S", makefile, re.MULTILINE))
    assert explained == make_targets()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony and set(phony.group(1).split()) == explained


def test_named_verbs_exist():
    named = []
    for path in [*DOCUMENTS, *COMMENTED]:
        text = path.read_text(encoding="utf-8")
        for verb in verbs_named("\n".join(code_of(text)) if path.suffix == ".md" else text):
            named.append(verb)
            assert verb in VERBS, f"{path.relative_to(ROOT)} names the verb {verb}, which cal-train does not have"
    assert {"train", "compose", "check_data", "merge", "demo"} <= set(named)


def test_every_verb_has_its_module():
    for verb in VERBS:
        assert (ROOT / "cal_train" / "cli" / f"{verb}.py").is_file(), f"cal-train {verb} has no module"


def test_documents_name_no_path_of_one_machine():
    for path in [*DOCUMENTS, *COMMENTED]:
        found = re.search(r"(?<![\w.])/(?:home|root|Users|work|tmp)/\S*", path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(ROOT)} names {found and found.group()}"
