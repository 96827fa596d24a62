"""The documentation says what the code says."""

import re
from pathlib import Path

from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

from jobs.options import document

ROOT = Path(__file__).parents[2]


def test_the_options_are_those_of_the_code():
    """`python -m jobs.options > docs/options.md` writes them anew."""
    assert (ROOT / "docs/options.md").read_text() == document()


def test_every_message_in_troubleshooting_is_one_of_the_code():
    places = [
        path for part in ("cluster", "sepico", "jobs") for path in (ROOT / part).rglob("*.py")
    ]
    code = "\n".join(path.read_text() for path in places)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # strings that go on in the next line
    rows = re.findall(r"^\| `(.+?)`", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    assert len(rows) > 35
    for message in rows:
        for part in filter(None, map(str.strip, message.split("..."))):
            assert part in code, message


def test_what_the_commands_write_beside_the_code_is_not_sent_with_a_job():
    ignored = get_excludes_from_ignore_files(ROOT, include_gitignore=True)
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(page.read_text() for page in pages)
    places = {"runs", "demo", "exported", *re.findall(r"--to ([a-z][^\s:]*)\s", text)}
    assert {"shards/day", "predictions"} <= places
    for place in places:
        assert any(matches(ROOT / place / "file") for matches in ignored), place


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"
