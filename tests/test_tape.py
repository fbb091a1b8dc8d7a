"""The tape of a step: which module made what, what is kept, gradients; and its pictures, with any names in them."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.backend import Key, normal
from minivit.backend.outline import outline
from minivit.cli.main import main
from minivit.errors import GraphError
from minivit.measure.costs import layer_costs, model_costs
from minivit.measure.tape import read_tape
from minivit.models import configuration, model_outline
from minivit.nn.layers import LayerNorm, Linear
from minivit.nn.module import Module
from minivit.show.diagram import tape_svg, write_tape
from minivit.show.dot import quoted, tape_dot
from minivit.show.folding import SCRIPT
from minivit.show.operations import Operation, Weight, runs_of_parts

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '</text><script>alert("1")</script>\\"]; n0 -> n1 & \n\u202e{x|y}'


def small(**settings: Any) -> mv.ViT:
    """Return a model in float64 whose head is not zero, so that gradients reach all of it."""
    model = mv.ViT(**{"image_size": 8, "patch_size": 4, "dim": 8, "depth": 3, "heads": 2, **settings}).to(np.float64)
    model.head.weight.data[...] = normal(Key(3), model.head.weight.shape)
    return model


@pytest.fixture(scope="module")
def tape() -> list[Operation]:
    return read_tape(small(), normal(Key(1), (2, 3, 8, 8)).astype(np.float64), np.array([3, 1]), gradients=True)


# ---- reading it ------------------------------------------------------------------------------------------------------


def test_every_operation_knows_its_module(tape):
    block = [
        ("norm1", "layer_norm"), ("attn.qkv", "linear"), ("attn", "self_attention"), ("attn.proj", "linear"),
        ("norm2", "layer_norm"), ("mlp.fc1", "linear"), ("mlp", "gelu"), ("mlp.fc2", "linear"),
    ]  # fmt: skip
    blocks = [(f"blocks.{i}.{place}", name) for i in range(3) for place, name in block]
    blocks.insert(2 * len(block), ("blocks.2", "getitem"))  # the class token, which is all that is read of the last
    assert [(one.place, one.name) for one in tape] == [
        ("patch_embed.proj", "linear"), ("", "embed_tokens"), *blocks, ("norm", "layer_norm"), ("", "getitem"),
        ("head", "linear"), ("", "cross_entropy"),
    ]  # fmt: skip
    assert {one.part for one in tape} == {"", "patch_embed", "blocks.0", "blocks.1", "blocks.2", "norm", "head"}
    assert tape[2].kind == "EncoderBlock" and tape[2].weights[0].name == "blocks.0.norm1.weight"
    assert [len(run) for run in runs_of_parts(tape)] == [1, 1, 8, 8, 9, 1, 1, 1, 1]


def test_residual_connections_are_inputs(tape):
    into_proj = tape[5]
    assert (into_proj.place, into_proj.inputs) == ("blocks.0.attn.proj", (4, 1))  # the heads, and the embedding
    assert all(j < i for i, one in enumerate(tape) for j in one.inputs)
    assert tape[3].shape == (2, 5, 24) and tape[3].dtype == "float64"


@pytest.mark.parametrize(
    "name, settings",
    [("vit_digits", {}), ("vit_cifar", {"drop_path": 0.2, "pool": "mean"}), ("vit_digits", {"recompute": True}),
     ("vit_mnist", {"dropout": 0.1, "pool": "none", "head": "mlp"})],
)  # fmt: skip
def test_what_is_kept_is_what_summary_says(name, settings):
    """In all and by block; the loss, which summary leaves out, keeps its own. A batch keeps so much for each image."""
    kind, config = configuration(name)
    config = {**config, **settings}
    model = model_outline(kind, config)
    tape = read_tape(model, outline((1, *model.settings.image_shape)))
    assert tape[-1].name == "cross_entropy"
    assert sum(one.kept for one in tape[:-1]) == model_costs(model).total.kept
    rows = layer_costs(model, outline((1, *model.settings.image_shape)))
    for i in range(config["depth"]):
        of_block = sum(one.kept for one in tape if one.part == f"blocks.{i}")
        assert of_block == sum(row.kept for row_of, row in rows.items() if f"{row_of}.".startswith(f"blocks.{i}."))
    batch = read_tape(model, outline((7, *model.settings.image_shape)))
    assert sum(one.kept for one in batch) == pytest.approx(7 * sum(one.kept for one in tape), rel=1e-3)


def test_gradients_are_those_of_backward_and_of_differences(tape):
    model = small()
    images, labels = normal(Key(1), (2, 3, 8, 8)).astype(np.float64), np.array([3, 1])
    ops.cross_entropy(model.train()(images), labels).backward()
    weights = {w.name: w.gradient for one in tape for w in one.weights}
    assert weights.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert weights[name] == pytest.approx(np.linalg.norm(p.grad), rel=1e-12)
    logits = model(images)
    [flow] = mv.grad(ops.cross_entropy(logits, labels), [logits])
    assert tape[-2].gradient == pytest.approx(np.linalg.norm(flow.numpy()), rel=1e-12)
    assert tape[-1].gradient == 1 and all(one.gradient > 0 for one in tape)


class Shared(Module):
    """One layer used twice, with another between, and a list within a list."""

    def __init__(self) -> None:
        self.stages = [[Linear(6, 6)], [LayerNorm(6)]]
        self.last = Linear(6, 3)

    def forward(self, x: Any) -> Any:
        layer, norm = self.stages[0][0], self.stages[1][0]
        return self.last(layer(norm(layer(x))) + x)


def test_a_layer_that_runs_twice_stands_twice_and_its_gradient_is_the_sum():
    model, x = Shared().to(np.float64), normal(Key(0), (4, 6))
    tape = read_tape(model, x, np.array([0, 1, 2, 0]), gradients=True)
    assert [one.place for one in tape] == ["stages.0.0", "stages.1.0", "stages.0.0", "", "last", ""]
    assert tape[0].weights == tape[2].weights
    ops.cross_entropy(model(x), np.array([0, 1, 2, 0])).backward()
    assert tape[0].weights[0].gradient == pytest.approx(np.linalg.norm(model.stages[0][0].weight.grad), rel=1e-5)


def test_a_frozen_model_has_no_tape():
    model = small()
    for p in model.parameters():
        p.requires_grad = False
    with pytest.raises(GraphError, match="no parameter"):
        read_tape(model, normal(Key(1), (1, 3, 8, 8)).astype(np.float64))


# ---- the pictures ----------------------------------------------------------------------------------------------------


def hostile() -> list[Operation]:
    return [
        Operation(HOSTILE, HOSTILE, HOSTILE, HOSTILE, (2, 3), HOSTILE, 5, (), (Weight(HOSTILE, (3,), float("nan")),)),
        Operation(HOSTILE, "", HOSTILE, HOSTILE, (), "float32", 10**12, (0,), (), float("inf")),
        Operation("y", "m" * 300, "n" * 300, "k" * 300, (9,) * 30, "float32", 0, (0, 1), (), 1e-30),
    ]


@pytest.mark.parametrize("which", ["small", "hostile"])
def test_the_svg_is_xml_that_holds_every_operation_folded(tape, which):
    tape = tape if which == "small" else hostile()
    svg = tape_svg(tape, HOSTILE, [HOSTILE])
    root = ElementTree.fromstring(svg)
    assert [e.text for e in root.iter(f"{SVG}script")] == [SCRIPT]  # and no other
    assert "<" not in SCRIPT and "&" not in SCRIPT  # the same text in HTML, where SVG's scripts know no entities
    items = [e for e in root.iter(f"{SVG}g") if e.get("class") == "item"]
    runs = runs_of_parts(tape)
    assert [len(item.findall(f".//{SVG}rect[@class='box']")) for item in items] == [len(run) for run in runs]
    inner = [e for e in root.iter(f"{SVG}g") if e.get("class") == "inner"]
    assert len(inner) == sum(len(run) > 1 for run in runs)
    assert all(e.get("display") == "none" for e in inner)
    tops = [float(re.fullmatch(r"translate\(0 (\S+)\)", item.get("transform"))[1]) for item in items]
    ends = [top + float(item.get("data-height")) for top, item in zip(tops, items, strict=True)]
    assert all(a < b for a, b in zip(ends, tops[1:], strict=False))  # one below the other
    assert ends[-1] < float(root.get("height"))
    assert all(float(e.get("width", 0)) <= float(root.get("width")) for e in root.iter(f"{SVG}rect"))


def test_arcs_are_the_connections_that_skip(tape):
    """Two in a block: what comes in goes to the projection, and what that gives to the end of the MLP."""
    root = ElementTree.fromstring(tape_svg(tape, "title"))
    arcs = [len(e.findall(f"{SVG}path[@class='arc']")) for e in root.iter(f"{SVG}g") if e.get("class") == "inner"]
    assert arcs == [2, 2, 3]  # in the last, to norm1 and from the class token
    assert not [e for e in root.iter(f"{SVG}g") if e.get("class") == "far"]


def test_arcs_between_parts_say_where_they_go_when_those_unfold():
    tape = [
        Operation("a", "p.0", "p.0", "P", (1,), "float32", 0, ()),
        Operation("b", "p.0", "p.0", "P", (1,), "float32", 0, (0,)),
        Operation("c", "p.1", "p.1", "P", (1,), "float32", 0, (1,)),
        Operation("d", "p.1", "p.1", "P", (1,), "float32", 0, (2,)),
        Operation("e", "", "", "", (1,), "float32", 0, (3, 0, 1)),
    ]
    root = ElementTree.fromstring(tape_svg(tape, "title"))
    far = [e for e in root.iter(f"{SVG}g") if e.get("class") == "far"]
    ends = [(e.get("data-from").split(), e.get("data-to").split()) for e in far]
    assert [(a[:2], b) for a, b in ends] == [(["0", "13"], ["2", "13", "13"])] * 2
    assert float(ends[0][0][2]) < float(ends[1][0][2])  # from a, from b below it
    assert len({e.get("data-lane") for e in far}) == 2


def test_the_page_lets_only_its_own_style_and_script_count(tape, tmp_path):
    write_tape(tmp_path / "x.html", tape, HOSTILE)
    page = (tmp_path / "x.html").read_text()
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1])
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert policy.count("sha256-") == 3 and page.count("<script>") == 1 and page.count("<style>") == 2
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")


def parsed_dot(text: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the nodes and edges of DOT text, of the subset that is written here; raise where it is none of it."""
    string = r'"(?:[^"\\]|\\.)*"'
    attribute = rf"\w+=(?:{string}|\w+)"
    grammar = re.compile(
        rf"\s*(?:(digraph tape \{{|subgraph cluster_\d+ \{{)|(\}})|(?:graph|node) \[{attribute}(?:, {attribute})*\]"
        rf"|label={string}|(\w+) -> (\w+)(?: \[{attribute}\])?|(\w+) \[{attribute}(?:, {attribute})*\])\n"
    )
    nodes, edges, depth, place = [], [], 0, 0
    while place < len(text):
        found = grammar.match(text, place)
        assert found, text[place : place + 200]
        depth += bool(found[1]) - bool(found[2])
        nodes += [found[5]] if found[5] else []
        edges += [(found[3], found[4])] if found[3] else []
        place = found.end()
    assert depth == 0
    return nodes, edges


@pytest.mark.parametrize("which", ["small", "hostile"])
def test_the_dot_file_is_dot(tape, which):
    tape = tape if which == "small" else hostile()
    text = tape_dot(tape, HOSTILE, [HOSTILE])
    nodes, edges = parsed_dot(text)
    names = {w.name for one in tape for w in one.weights}
    assert len(nodes) == len(set(nodes)) == len(tape) + len(names)
    assert {node for edge in edges for node in edge} <= set(nodes)
    operations = [edge for edge in edges if edge[0][0] == "n"]
    assert operations == [(f"n{j}", f"n{i}") for i, one in enumerate(tape) for j in one.inputs]
    if dot := shutil.which("dot"):
        drawn = subprocess.run([dot, "-Tplain"], input=text, capture_output=True, text=True, check=True)
        assert drawn.stderr == "" and sum(line.startswith("node ") for line in drawn.stdout.splitlines()) == len(nodes)


def test_a_quoted_string_ends_where_it_should():
    assert quoted('a"b', "c\\", "d\ne") == r'"a\"b\nc\\\\nd\\ne"'.replace(r"\\\\n", r"\\" + r"\n")
    assert quoted("\\") == '"\\\\"'


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_draws_a_named_model_and_overwrites_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    assert main(["graph", "vit_large_patch16_224"]) == 0
    assert time.perf_counter() - start < 10  # it takes 0.3 s
    out = capsys.readouterr().out
    assert "199 operations, 304,326,632 parameters" in out and "graph.svg" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph.dot", "graph.svg"]
    Path("graph.svg").unlink()
    Path("graph.dot").write_text("mine")
    for args in ([], ["-o", "."]):
        assert main(["graph", *args]) == 1
        assert "graph.dot is there already" in capsys.readouterr().err
    assert Path("graph.dot").read_text() == "mine" and not Path("graph.svg").exists()
    assert main(["graph", "-o", "graph.dot"]) == 0
    assert Path("graph.dot").read_text().startswith("digraph")
    assert main(["graph", "-o", "tape.png"]) == 1
    assert "end the name in .svg, .dot, .html" in capsys.readouterr().err


def test_the_command_says_where_the_gradients_come_from(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = (normal(Key(2), (40, 1, 8, 8)) * 50 + 128).clip(0, 255).astype(np.uint8)
    np.savez("toy.npz", images=images, labels=np.arange(40) % 3)
    data = mv.data.load("toy.npz")
    model = mv.ViT(image_size=8, patch_size=4, in_channels=1, num_classes=3, dim=8, depth=2, heads=2)
    mv.save(model, "with.npz", data=data)
    mv.save(model, "without.npz")
    assert main(["graph", "with.npz", "-o", "x.html", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "40 training images" in found["images"] and found["why"] == "" and found["files"] == ["x.html"]
    assert found["tape"][-2]["gradient"] > 0 and found["tape"][0]["shape"] == [40, 4, 8]
    assert "gradient’s norm" in Path("x.html").read_text()
    assert main(["graph", "without.npz", "-o", "x.svg"]) == 0
    assert "one image of standard-normal noise, labelled 0: 1 × 1 × 8 × 8" in capsys.readouterr().out
    Path("toy.npz").unlink()
    assert main(["graph", "with.npz", "-o", "x.svg"]) == 0
    assert "toy.npz: no such file" in capsys.readouterr().out
    assert main(["graph", "nothing.npz", "-o", "x.svg"]) == 1
