"""Helpers for the tests of the pages: valid and hostile images, the server of a page, and the browser."""

import ast
import asyncio
import base64
import contextlib
import importlib.util
import inspect
import io
import os
import re
import struct
import subprocess
import sys
import time
import urllib.request
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
WRITE = """
for (const part of document.querySelectorAll('.gradio-container .prose')) {
    const line = document.createElement('p');
    line.innerHTML = `${arguments[0]} <code>${arguments[0]}</code>`;
    part.append(line);
}
"""
ARROWS = """
return [...document.querySelectorAll('.secondary-wrap')].flatMap(box => {
    const text = box.querySelector('input'), arrow = box.querySelector('.icon-wrap');
    if (!arrow || !box.offsetWidth) return [];
    const end = text.getBoundingClientRect().right - parseFloat(getComputedStyle(text).paddingRight);
    return [arrow.getBoundingClientRect().left - end];
});
"""
HOSTILE = {"huge": "more than 50 million pixels", "empty": "The file is empty", "text": "not an image"}


def load_app(name):
    """Import the app.py of a Space."""
    spec = importlib.util.spec_from_file_location(f"{name}_app", ROOT / "spaces" / name / "app.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def build_demo(app, *args, **options):
    """Build the page inside a running event loop. Otherwise gradio creates event loops and does not close them."""

    async def build():
        return app.build_demo(*args, **options)

    return asyncio.run(build())


def find_endpoint(demo, name, *, tools=(), required=1):
    """Return an endpoint of a page: a function with keyword arguments, where an image is a path.

    Every parameter must have a name, and an MCP client must see a description of each.

    Args:
        demo: The page.
        name: Name of the endpoint.
        tools: Names of all endpoints of the page. Defaults to `name` alone.
        required: Number of arguments without a default.
    """
    endpoints, listed = demo.get_api_info()["named_endpoints"], asyncio.run(list_tools(demo))
    assert list(endpoints) == [f"/{each}" for each in tools or [name]]
    assert [tool.name for tool in listed] == list(tools or [name])
    names = [parameter["parameter_name"] for parameter in endpoints[f"/{name}"]["parameters"]]
    (tool,) = (each for each in listed if each.name == name)
    assert tool.description.endswith(".")
    assert list(tool.inputSchema["properties"]) == names
    assert tool.inputSchema.get("required", []) == names[:required]
    assert all(each["description"].endswith(".") for each in tool.inputSchema["properties"].values())
    (function,) = (each.fn for each in demo.fns.values() if each.api_name == name)
    signature = inspect.signature(function)

    def call(**arguments):
        if "image" in arguments:
            arguments["image"] = {"path": str(arguments["image"]), "meta": {"_type": "gradio.FileData"}}
        bound = signature.bind(**arguments)
        bound.apply_defaults()
        return function(*bound.arguments.values())

    return call


async def list_tools(demo):
    """Return the tools that an MCP client sees."""
    from gradio.mcp import GradioMCPServer
    from mcp.shared.memory import create_connected_server_and_client_session

    async with create_connected_server_and_client_session(GradioMCPServer(demo).mcp_server) as session:
        return (await session.list_tools()).tools


def call_tool(address, name, *, tools=(), **arguments):
    """Call a tool of a running page as an MCP client does, and return its dict, or the text of its error.

    Args:
        address: Address of the page.
        name: Name of the tool.
        tools: Names of all tools of the page. Defaults to `name` alone.
        **arguments: Arguments of the tool.
    """
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    async def call():
        transport = streamable_http_client(f"{address.rstrip('/')}/gradio_api/mcp/")
        async with transport as (read, write, _), ClientSession(read, write) as session:
            await session.initialize()
            assert [tool.name for tool in (await session.list_tools()).tools] == list(tools or [name])
            return await session.call_tool(name, arguments)

    result = asyncio.run(call())
    (content,) = result.content
    return content.text if result.isError else ast.literal_eval(content.text)


def as_url(path):
    """Return a PNG file as a data URL, which MCP clients pass in place of a file."""
    return f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def download(file):
    """Open a picture of a tool's result."""
    with urllib.request.urlopen(file["url"]) as response:
        return Image.open(io.BytesIO(response.read()))


def run_example(name, address, folder):
    """Run the client example in the README of a Space, and return its `found`."""
    text = (ROOT / "spaces" / name / "README.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "gradio_client" in block)
    make_image().save(folder / "photo.jpg")
    code = code.replace("http://127.0.0.1:7860", address).replace("photo.jpg", str(folder / "photo.jpg"))
    variables = {}
    exec(code, variables)
    return variables["found"]


def make_image(size=(60, 40), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def write_huge_png(path, side=20_000):
    """Write a valid PNG of one color that would need side² x 3 bytes to decode."""
    squeeze = zlib.compressobj(1)
    row = bytes(1 + side // 8)
    data = b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush()

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def write_hostile(kind, path):
    if kind == "huge":
        write_huge_png(path)
    else:
        path.write_bytes({"empty": b"", "text": b"not an image, whatever its name says"}[kind])


def write_script(root, name, body):
    (root / "scripts").mkdir(exist_ok=True)
    (root / "scripts" / name).write_text(body)


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.05)


def check_space(name):
    """Check the requirements and front matter of a Space, and its recorded results."""
    import json
    import tomllib

    import gradio as gr
    import yaml

    from hf_dl.demo.recordings import MAX_PICTURE, show_recordings

    space = ROOT / "spaces" / name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = project["dependencies"] + project["optional-dependencies"]["demo"]
    lines = (space / "requirements.txt").read_text().split()
    assert any(line.startswith("gradio[mcp]") for line in lines)  # without it, the page does not start
    assert all(line.startswith("hf_dl") or line in allowed for line in lines)
    matter = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert matter["sdk_version"].split(".")[0] == gr.__version__.split(".")[0]
    recorded = json.loads((space / "examples" / "examples.json").read_text())
    named = {picture["file"] for example in recorded["examples"] for picture in example["pictures"]}
    present = {path.name: path.stat().st_size for path in (space / "examples").glob("*.png")}
    assert set(present) == {*named, "title.png"} and max(present.values()) <= MAX_PICTURE
    assert show_recordings(space).count("<img") == len(named) >= 3
    assert recorded["run"]["commit"] and all(0 < score <= 1 for score in recorded["scores"].values())
    assert "(examples/title.png)" in (space / "README.md").read_text()


@contextlib.contextmanager
def serve_command(command, folder, **env):
    """Run a command that serves a page, and yield its address and the file with its output."""
    output = folder / "output.txt"
    more = {"GRADIO_TEMP_DIR": str(folder / "gradio"), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **env}
    with open(output, "wb") as file:
        process = subprocess.Popen(command, cwd=folder, env={**os.environ, **more}, stdout=file, stderr=file)
    try:
        wait_for(lambda: "http://" in output.read_text() or process.poll() is not None, seconds=600)
        found = re.search(r"http://\S+", output.read_text())
        assert found, output.read_text()
        yield found[0], output
    finally:
        process.terminate()
        process.wait(30)


def serve(name, model, folder, **more):
    """Start an app as a user does, and yield its address and the file with its output."""
    settings = {name: str(value) for name, value in {"HF_DL_MODEL": model, **more}.items()}
    return serve_command([sys.executable, str(ROOT / "spaces" / name / "app.py")], folder, **settings)


def shown(browser, name):
    """Return the address of a view's picture, in one script call because the page may be changing it."""
    return browser.execute_script(f"return document.querySelector('#{name} img')?.src")


def text_of(browser, name):
    from selenium.webdriver.common.by import By

    return " ".join(element.text for element in browser.find_elements(By.ID, name))


def press(browser, name, label):
    """Click on the button of a group that has this label."""
    from selenium.webdriver.common.by import By

    next(e for e in browser.find_elements(By.CSS_SELECTOR, f"#{name} label") if label in e.text).click()


def upload(browser, path, name="file"):
    from selenium.webdriver.common.by import By

    wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, f"#{name} input[type=file]"))  # no file lies there
    browser.find_element(By.CSS_SELECTOR, f"#{name} input[type=file]").send_keys(str(path))


@contextlib.contextmanager
def phone(browser):
    """Give the browser the width of a phone, and check at the end that an open page does not scroll sideways.

    The page is measured as it is, and with long words without spaces in each of its texts. The text of a dropdown must
    end before its arrow.
    """
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        yield
        for word in ("", "/srv/" + "a_folder_with_a_long_name" * 4 + "multiply(n0,const_100)|" * 8):
            browser.execute_script(WRITE, word)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        assert all(gap >= 0 for gap in browser.execute_script(ARROWS))
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def check_hostile_files(browser, kind, folder, picture, name="file"):
    """Check that a hostile file gives one sentence, keeps the picture, and does not break the page."""
    before = shown(browser, picture)
    write_hostile(kind, folder / "a.png")
    upload(browser, folder / "a.png", name)
    wait_for(lambda: HOSTILE[kind] in browser.page_source)
    assert shown(browser, picture) == before
    assert "Traceback" not in browser.page_source
    make_image().save(folder / "good.png")
    upload(browser, folder / "good.png", name)
    wait_for(lambda: shown(browser, picture) != before)


def check_unknown_model(browser):
    """Check that an unknown model name gives one sentence."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    box = browser.find_element(By.CSS_SELECTOR, "#name textarea, #name input")
    box.send_keys("nobody/no-such-model", Keys.ENTER)
    wait_for(lambda: "was not found. Expected a folder" in browser.page_source)
    assert "Traceback" not in browser.page_source
