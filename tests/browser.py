"""
A real browser for the pages, without a driver: Chromium loads a copy of the page that runs a script and prints the
DOM.

Nothing is installed here. `CHROMIUM` names the binary if it is not on the path. `AXE_CORE` names `axe.min.js`, unless
a package that carries it is installed (`pip install --no-deps axe-playwright-python`). `VNU_JAR` names the Nu HTML
checker (needs Java); else html5lib checks the syntax. What is missing is skipped, with the reason.
"""

import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest


CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary (set CHROMIUM, or install chromium)")

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=20000"
).split()

_RUNNER = """<script>LIBRARY</script><script>
window.addEventListener("error", (e) => { document.documentElement.dataset.error = e.message; });
(async () => {
  let value;
  try { value = await (async () => { SCRIPT })(); } catch (e) { value = { error: String(e) }; }
  const out = document.createElement("pre");
  out.id = "browser-result";
  out.textContent = JSON.stringify(value);
  document.body.append(out);
})();
</script>"""


def _run(page: Path, *flags: str) -> str:
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        result = subprocess.run(
            [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", *flags, page.resolve().as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def evaluate_in_page(page: Path, script: str, folder: Path, *flags: str, library: str = "") -> Any:
    """
    Value that an async function body returns in the loaded page.

    The page's own policy forbids all requests; it stays in force.
    """
    runner = _RUNNER.replace("SCRIPT", script).replace("LIBRARY", library)
    copy = folder / f"browser-{page.name}"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", runner + "</body>"), encoding="utf-8")
    dom = _run(copy, "--dump-dom", *flags)
    found = re.search(r'<pre id="browser-result">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-2000:]
    assert 'data-error="' not in dom, re.findall(r'data-error="([^"]*)"', dom)
    return json.loads(html.unescape(found[1]))


def screenshot(page: Path, target: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
    """Saves what the page looks like."""
    _run(page, f"--screenshot={target}", f"--window-size={width},{height}", *_scheme(dark))


def _scheme(dark: bool) -> list[str]:
    return [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]


def _axe() -> str:
    path = os.environ.get("AXE_CORE")
    if path is None:
        spec = importlib.util.find_spec("axe_playwright_python")
        folders = spec.submodule_search_locations if spec else None
        found = [p for folder in folders or () for p in Path(folder).rglob("axe.min.js")]
        path = str(found[0]) if found else None
    if path is None:
        pytest.skip("no axe-core (set AXE_CORE, or pip install --no-deps axe-playwright-python)")
    return Path(path).read_text(encoding="utf-8")


def accessibility_violations(page: Path, folder: Path, dark: bool = False) -> list[str]:
    """What axe-core finds against WCAG 2.2 A and AA and its best practices, in one line each."""
    script = """
    document.querySelectorAll("details").forEach((d) => { d.open = true; });
    const scheme = matchMedia("(prefers-color-scheme: dark)").matches;
    const result = await axe.run(document, { resultTypes: ["violations"] });
    return { scheme, passes: result.passes.length, violations: result.violations.map((v) =>
      `${v.id}: ${v.help}: ${v.nodes.slice(0, 3).map((n) => n.html.slice(0, 120) + n.failureSummary).join(" | ")}`) };
    """
    result = evaluate_in_page(page, script, folder, *_scheme(dark), library=_axe())
    assert "error" not in result, result
    assert result["scheme"] is dark and result["passes"] > 10
    return result["violations"]


def overflow(page: Path, folder: Path, width: int) -> list[str]:
    """Elements that reach beyond the right edge of a window `width` px wide, except inside their own scroll areas."""
    # Headless windows are at least 500 px wide, so the page is loaded in a frame
    holder = folder / f"frame-{width}.html"
    source = html.escape(page.read_text(encoding="utf-8"), quote=True)
    holder.write_text(f'<!DOCTYPE html><body><iframe width="{width}" height="900" srcdoc="{source}"></iframe></body>')
    script = f"""
    const box = document.querySelector("iframe");
    while (!box.contentDocument.querySelector("main") || box.contentDocument.readyState !== "complete")
      await new Promise((done) => setTimeout(done, 50));
    const frame = box.contentDocument;
    frame.querySelectorAll("details").forEach((d) => {{ d.open = true; }});
    const found = [...frame.body.querySelectorAll("*")].filter((node) => !node.closest(".scroll table, svg")
      && node.getBoundingClientRect().right > {width} + 0.5).map((node) => node.outerHTML.slice(0, 100));
    const wide = frame.documentElement.scrollWidth;
    return wide > {width} ? ["page: " + wide, ...found] : found;
    """
    return evaluate_in_page(holder, script, folder)


def html_errors(text: str) -> list[str]:
    """Errors of the Nu HTML checker, or of html5lib's parser where that is missing."""
    jar = os.environ.get("VNU_JAR")
    if jar is not None and shutil.which("java"):
        result = subprocess.run(
            ["java", "-jar", jar, "--format", "json", "--errors-only", "-"], input=text.encode(), capture_output=True
        )
        return [message["message"] for message in json.loads(result.stderr)["messages"]]
    html5lib = pytest.importorskip("html5lib", reason="neither VNU_JAR nor html5lib to check HTML with")
    parser = html5lib.HTMLParser(strict=False)
    parser.parse(text)
    return [f"{position}: {code} {values}" for position, code, values in parser.errors]


def requests_made(text: str) -> list[str]:
    """Sources that the document would load, by its parse tree."""
    html5lib = pytest.importorskip("html5lib", reason="html5lib is not installed")
    tree = html5lib.parse(text, namespaceHTMLElements=False)
    return [
        value
        for node in tree.iter()
        for key, value in node.attrib.items()
        if key in ("src", "href", "srcset", "action", "poster") and not value.startswith(("data:", "#"))
    ]


if __name__ == "__main__":
    screenshot(Path(sys.argv[1]), Path(sys.argv[2]), height=int(sys.argv[3]))
