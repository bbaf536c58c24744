"""The C++ plugins against TensorRT's headers: both compile without a warning, want no TensorRT library, export what
they should, and follow the rules of ``rules.py``.

Headers come from MAMBA_DEPLOY_TEST_HEADERS, or ``.headers`` in the repository: a folder with one of NvInfer.h for each
version, as ``include/`` of github.com/NVIDIA/TensorRT at a version's tag.
"""

from __future__ import annotations

import ctypes
import math
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mamba_deploy.errors import PluginError
from mamba_deploy.plugins import arguments, build, structs
from mamba_deploy.plugins.rules import FLOATS, OPS, Node
from mamba_deploy.plugins.toolchain import Headers, find_compiler, find_headers

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "plugins"
FOLDER = Path(os.environ.get("MAMBA_DEPLOY_TEST_HEADERS", ROOT / ".headers"))
VERSIONS = sorted(path.parent for path in FOLDER.glob("*/NvInfer.h"))
DTYPES = ("float32", "float16", "int8", "int32", "bool", "bfloat16")  # those of C++ are in PROGRAM
WARNINGS = ("-Wall", "-Wextra", "-Werror")
NO_HEADERS = f"no C++ headers of TensorRT: no */NvInfer.h in {FOLDER}; MAMBA_DEPLOY_TEST_HEADERS names the folder"


STRUCTS = {op.kernel: arguments.SIGNATURES[op.kernel].struct for op in OPS.values()}


def _print(struct: type[ctypes.Structure], prefix: str = "", *values: str) -> str:
    """A line of C that prints what a struct ``c`` points to holds."""
    formats = {ctypes.c_int32: ("%d", "c->{}"), ctypes.c_float: ("%.9g", "c->{}"), ctypes.c_void_p: ("%d", "IS(c->{})")}
    names = [(field[0], *formats[field[1]]) for field in struct._fields_]
    text = " ".join(f"{prefix}{n}={form}" for n, form, _ in names)
    given = [value for n, _, v in names for value in (*values, v.format(n))]
    return f'printf("{text} ", {", ".join(given)});'


def _stub(kernel: str, struct: type[ctypes.Structure]) -> str:
    """A launch prints what it was given; of the workspace a smaller batch may need more."""
    layers = _print(structs.MambaLayer, "%d.", "i") if kernel == "model" else ""
    each = f"for (int i = 0; i < c->layers; i++) {{ const MambaLayer* c = all + i; {layers} }}" if layers else ""
    return f"""
size_t mamba_{kernel}_workspace(const {struct.__name__}* c) {{ return bytes(c->batch, c->length); }}
int mamba_{kernel}(const {struct.__name__}* c, void* w, void* s) {{
    (void)w; (void)s;
    {_print(struct)}
    {"const MambaLayer* all = c->each;" if each else ""}
    {each}
    return 0;
}}"""


STUB = """
#include <stdio.h>
#include "mamba_kernels.h"
static size_t bytes(int b, int l) { int parts = 12 / b; return (size_t)256 * (parts < l ? parts : l); }
#define IS(p) ((p) != NULL)
""" + "\n".join(_stub(kernel, struct) for kernel, struct in STRUCTS.items())

# Answers questions, a line each: OP, its attributes as "name i 3" ended by ".", and
#   make | types DTYPE.. | supports POSITION DTYPE.. | format POSITION DTYPE.. | shapes RANK..
#   call DTYPE.. / DIMS.. | workspace DTYPE.. / DIMS..   where dims are 2,3,4
# The plugin asked has been through its serialized form and a clone.
PROGRAM = r"""
#include <NvInferRuntime.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>
using namespace nvinfer1;
#define V2 (NV_TENSORRT_MAJOR == 8)
#if V2
using Plugin = IPluginV2DynamicExt;
using Creator = IPluginCreator;
extern "C" IPluginCreator* const* getPluginCreators(int32_t& count);
#else
struct Plugin {
    IPluginV3* whole;
    template <class T> T* as(PluginCapabilityType type) { return static_cast<T*>(whole->getCapabilityInterface(type)); }
    IPluginV3OneBuild* build() { return as<IPluginV3OneBuild>(PluginCapabilityType::kBUILD); }
    IPluginV3OneRuntime* runtime() { return as<IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME); }
    IPluginV3OneCore* core() { return as<IPluginV3OneCore>(PluginCapabilityType::kCORE); }
};
using Creator = IPluginCreatorV3One;
extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);
#endif
#if !V2 || NV_TENSORRT_MINOR >= 6
struct Log : ILogger { void log(Severity, AsciiChar const* text) noexcept override { std::printf("[%s] ", text); } };
struct Finder : ILoggerFinder { Log log; ILogger* findLogger() override { return &log; } } finder;
extern "C" void setLoggerFinder(ILoggerFinder*);
#endif
// A product of the expressions 16 * a and 16 * b is 16 * (10000 * a + b).
struct Product : apiv::VExprBuilder {
#if V2
    IDimensionExpr const* constant(int32_t) override { std::abort(); }
#else
    IDimensionExpr const* constant(int64_t) override { std::abort(); }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
        std::abort();
    }
#endif
    IDimensionExpr const* operation(
        DimensionOperation op, IDimensionExpr const& a, IDimensionExpr const& b) override {
        if (op != DimensionOperation::kPROD) std::abort();
        auto const number = [](IDimensionExpr const& e) { return reinterpret_cast<size_t>(&e) / 16; };
        return reinterpret_cast<IDimensionExpr const*>(16 * (10000 * number(a) + number(b)));
    }
} product;
struct Builder : IExprBuilder { Builder() { mImpl = &product; } } builder;

struct Named { char const* name; DataType type; } const dtypes[] = {
    {"float32", DataType::kFLOAT}, {"float16", DataType::kHALF}, {"int8", DataType::kINT8},
    {"int32", DataType::kINT32}, {"bool", DataType::kBOOL},
#if !V2
    {"bfloat16", DataType::kBF16},
#endif
};
DataType dtype(std::string const& name) {
    for (auto const& known : dtypes) if (name == known.name) return known.type;
    std::abort();
}
char const* name_of(DataType type) {
    for (auto const& known : dtypes) if (type == known.type) return known.name;
    return "?";
}

struct Tensors {
    std::vector<PluginTensorDesc> plain;
    std::vector<DynamicPluginTensorDesc> dynamic;
    std::vector<DataType> types;
    void add(DataType type) {
        PluginTensorDesc desc{};
        desc.type = type;
        desc.format = TensorFormat::kLINEAR;
        plain.push_back(desc);
        DynamicPluginTensorDesc wide{};
        wide.desc = desc;
        dynamic.push_back(wide);
        types.push_back(type);
    }
    void shape(size_t i, std::string text) {
        Dims dims{};
        for (char& c : text) if (c == ',') c = ' ';
        std::istringstream in(text);
        for (long size; in >> size;) dims.d[dims.nbDims++] = size;
        plain[i].dims = dynamic[i].desc.dims = dynamic[i].max = dims;
    }
};

Creator* find(std::string const& name) {
    int32_t count = 0;
#if V2
    auto const all = getPluginCreators(count);
#else
    auto const all = getCreators(count);
#endif
    for (int32_t i = 0; i < count; ++i) {
        auto const creator = static_cast<Creator*>(all[i]);
        if (name == creator->getPluginName()) return creator;
    }
    return nullptr;
}

bool make(Creator* creator, PluginFieldCollection const& fields, Plugin*& plugin) {
#if V2
    auto const made = static_cast<Plugin*>(creator->createPlugin("node", &fields));
    if (!made) return false;
    std::vector<char> data(made->getSerializationSize());
    made->serialize(data.data());
    auto const again = static_cast<Plugin*>(creator->deserializePlugin("node", data.data(), data.size()));
    plugin = again->clone();
    again->destroy();
    made->destroy();
#else
    Plugin made{creator->createPlugin("node", &fields, TensorRTPhase::kBUILD)};
    if (!made.whole) return false;
    Plugin again{creator->createPlugin("node", made.runtime()->getFieldsToSerialize(), TensorRTPhase::kRUNTIME)};
    if (!again.whole || !*made.build()->getTimingCacheID()) std::abort();
    if (std::strcmp(made.build()->getTimingCacheID(), again.build()->getTimingCacheID())) std::abort();
    plugin = new Plugin{again.runtime()->attachToContext(nullptr)->clone()};
    delete again.whole;
    delete made.whole;
#endif
    return true;
}

int main() {
#if !V2 || NV_TENSORRT_MINOR >= 6
    setLoggerFinder(&finder);
#endif
    for (std::string line; std::getline(std::cin, line); std::puts(""), std::fflush(stdout)) {
        std::istringstream in(line);
        std::string op, name, kind, word;
        in >> op;
        std::vector<PluginField> fields;
        std::vector<std::string*> kept;
        while (in >> name && name != ".") {
            in >> kind >> word;
            auto const key = new std::string(name), value = new std::string(word);
            if (kind == "i") {
                *value = std::string(4, '\0');
                int32_t const number = std::atoi(word.c_str());
                std::memcpy(&(*value)[0], &number, 4);
                fields.emplace_back(key->c_str(), value->data(), PluginFieldType::kINT32, 1);
            } else if (kind == "f") {
                *value = std::string(4, '\0');
                float const number = std::strtof(word.c_str(), nullptr);
                std::memcpy(&(*value)[0], &number, 4);
                fields.emplace_back(key->c_str(), value->data(), PluginFieldType::kFLOAT32, 1);
            } else {  // with and without the zero at the end
                fields.emplace_back(key->c_str(), value->c_str(), PluginFieldType::kCHAR, word.size() + (kind == "z"));
            }
        }
        PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
        Plugin* plugin = nullptr;
        Creator* const creator = find(op);
        if (!make(creator, collection, plugin)) {
            std::printf("refused");
            continue;
        }
        in >> kind;
        if (kind == "make") {
            auto const known = creator->getFieldNames();
            for (int32_t i = 0; i < known->nbFields; ++i) std::printf("%s ", known->fields[i].name);
            std::printf("%s %s", creator->getPluginVersion(), creator->getPluginNamespace());
            continue;
        }
        int32_t position = 0;
        if (kind == "supports" || kind == "format") in >> position;
        Tensors tensors;
        std::vector<DimsExprs> exprs;
        size_t shapes = 0;
        bool dims = false;
        while (in >> word) {
            if (kind == "shapes") {
                DimsExprs expr{};
                expr.nbDims = std::atoi(word.c_str());
                for (int32_t axis = 0; axis < expr.nbDims; ++axis) {
                    expr.d[axis] = reinterpret_cast<IDimensionExpr const*>(16 * (100 * (exprs.size() + 1) + axis));
                }
                exprs.push_back(expr);
            } else if (word == "/") {
                dims = true;
            } else if (dims) {
                tensors.shape(shapes++, word);
            } else {
                tensors.add(dtype(word));
            }
        }
        int32_t const count = static_cast<int32_t>(kind == "shapes" ? exprs.size() : tensors.types.size());
#if V2
        int32_t const outputs = plugin->getNbOutputs();
#else
        int32_t const outputs = plugin->build()->getNbOutputs();
#endif
        if (kind == "format") {
            tensors.plain[position].format = tensors.dynamic[position].desc.format = TensorFormat::kCHW2;
        }
        if (kind == "supports" || kind == "format") {
            int32_t const n = count - outputs;
#if V2
            bool const yes = plugin->supportsFormatCombination(position, tensors.plain.data(), n, outputs);
#else
            bool const yes = plugin->build()->supportsFormatCombination(position, tensors.dynamic.data(), n, outputs);
#endif
            std::printf("%d", yes);
        } else if (kind == "types") {
            std::vector<DataType> found(outputs);
#if V2
            for (int32_t i = 0; i < outputs; ++i) found[i] = plugin->getOutputDataType(i, tensors.types.data(), count);
#else
            if (plugin->build()->getOutputDataTypes(found.data(), outputs, tensors.types.data(), count)) {
                std::printf("refused");
                continue;
            }
#endif
            for (DataType type : found) std::printf("%s ", name_of(type));
        } else if (kind == "shapes") {
            std::vector<DimsExprs> found(outputs);
#if V2
            for (int32_t i = 0; i < outputs; ++i) {
                found[i] = plugin->getOutputDimensions(i, exprs.data(), count, builder);
            }
            bool const wrong = found[0].nbDims < 0;
#else
            bool const wrong =
                plugin->build()->getOutputShapes(exprs.data(), count, nullptr, 0, found.data(), outputs, builder) != 0;
#endif
            if (wrong) std::printf("refused");
            for (auto const& shape : found) {
                for (int32_t axis = 0; axis < shape.nbDims && !wrong; ++axis) {
                    auto const at = reinterpret_cast<size_t>(shape.d[axis]) / 16;
                    if (at >= 10000) std::printf("%zu.%zu*", at / 10000 / 100 - 1, at / 10000 % 100);
                    std::printf("%zu.%zu ", at % 10000 / 100 - 1, at % 100);
                }
                std::printf("| ");
            }
        } else if (kind == "workspace") {
#if V2
            std::printf("%zu", plugin->getWorkspaceSize(tensors.plain.data(), count, nullptr, outputs));
#else
            auto const build = plugin->build();
            if (build->configurePlugin(tensors.dynamic.data(), count, nullptr, outputs)) std::printf("refused ");
            std::printf("%zu", build->getWorkspaceSize(tensors.dynamic.data(), count, nullptr, outputs));
#endif
        } else if (kind == "call") {
            std::vector<void*> in_pointers(count, &tensors), out_pointers(outputs, &tensors);
#if V2
            int32_t const error = plugin->enqueue(
                tensors.plain.data(), nullptr, in_pointers.data(), out_pointers.data(), nullptr, nullptr);
#else
            int32_t const error = plugin->runtime()->enqueue(
                tensors.plain.data(), nullptr, in_pointers.data(), out_pointers.data(), nullptr, nullptr);
#endif
            if (error) std::printf("refused");
        }
#if V2
        plugin->destroy();
#else
        delete plugin->whole;
        delete plugin;
#endif
    }
}
"""


@dataclass
class Library:
    """A plugin library over the stand-in for the kernels."""

    interface: str
    label: str
    path: Path
    ask: Callable[[list[str]], list[str]]

    @property
    def floats(self) -> tuple[str, ...]:
        return FLOATS[:2] if self.interface == "v2" else FLOATS  # 8.x has no bfloat16


def compile_library(include: Path, work: Path, *register_flags: str) -> Headers:
    """Leave libmamba_plugin.so, libmamba_plugin_register.so and libstub.so in ``work``; skips where that cannot be."""
    if any(shutil.which(program) is None for program in ("gcc", "g++", "nm", "readelf")):
        pytest.skip("no gcc, g++, nm and readelf to compile and look with")
    try:
        cuda = find_compiler().include
    except PluginError as error:
        pytest.skip(f"no CUDA headers: {error}")
    headers = find_headers(include)
    (work / "stub.c").write_text(STUB)
    common = ["-fPIC", "-I", str(SOURCES), *WARNINGS]
    cpp = ["g++", "-std=c++17", "-O1", "-fvisibility=hidden", *common, f"-isystem{include}", f"-isystem{cuda}"]
    _run("gcc", *common, "-fvisibility=hidden", "-c", "stub.c", cwd=work)
    _run("gcc", *common, "-shared", "-o", "libstub.so", "stub.c", cwd=work)
    _run(*cpp, str(SOURCES / f"plugin_{headers.interface}.cpp"), "-c", "-o", "plugin.o", cwd=work)
    # No undefined symbol at all: not of TensorRT either.
    _run("g++", "-shared", "-Wl,--no-undefined", "-o", "libmamba_plugin.so", "plugin.o", "stub.o", cwd=work)
    _run(
        *cpp, str(SOURCES / "plugin_register.cpp"), *register_flags, "libmamba_plugin.so", "-shared",
        "-o", "libmamba_plugin_register.so", "-Wl,--no-undefined", "-Wl,-rpath,$ORIGIN", "-ldl", cwd=work,
    )  # fmt: skip
    return headers


@pytest.fixture(scope="session", params=VERSIONS or [None], ids=lambda path: path.name if path else "none")
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    if request.param is None:
        pytest.skip(NO_HEADERS)
    work = tmp_path_factory.mktemp("plugin")
    headers = compile_library(request.param, work)
    (work / "program.cpp").write_text(PROGRAM)
    system = [f"-isystem{request.param}", f"-isystem{find_compiler().include}"]
    _run("g++", "-std=c++17", "-w", *system, "program.cpp", "plugin.o", "stub.o", "-o", "program", cwd=work)

    def ask(questions: list[str]) -> list[str]:
        given = "".join(question + "\n" for question in questions)
        done = subprocess.run([work / "program"], input=given, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        answers = done.stdout.splitlines()
        assert len(answers) == len(questions), done.stderr
        return answers

    return Library(headers.interface, headers.label, work / "libmamba_plugin.so", ask)


def build_plugin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plugin library over the real kernels, for one architecture: minutes, then kept in pytest's cache."""
    include = next((path for path in reversed(VERSIONS) if not path.name.lstrip("v").startswith("8")), None)
    if include is None:
        pytest.skip(NO_HEADERS)
    monkeypatch.setenv("MAMBA_DEPLOY_CACHE", str(request.config.cache.mkdir("mamba-deploy")))
    try:
        return build.build("plugin", architectures=["90"], include=include).path
    except PluginError as error:
        if "lacks" in str(error) or "not found" in str(error):
            pytest.skip(str(error))
        raise


def _run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:4000]}"
    return done.stdout


# --- the libraries --------------------------------------------------------------------------------------------------


def _symbols(path: Path, *flags: str) -> list[str]:
    return [line.split()[-1] for line in _run("nm", "-D", *flags, path.name, cwd=path.parent).splitlines()]


def test_plugin_exports_what_load_library_looks_for_and_nothing_else(library):
    expected = {"v2": {"getPluginCreators", "setLoggerFinder"}, "v3": {"getCreators", "setLoggerFinder"}}[
        library.interface
    ]
    if library.label.startswith("TensorRT 8.5"):  # which cannot load libraries, and has no ILoggerFinder
        expected = {"getPluginCreators"}
    assert set(_symbols(library.path, "--defined-only")) == expected


def test_no_library_links_tensorrt(library):
    """No undefined symbol is TensorRT's (the linker saw to it), and none comes from a library of its."""
    for path in (library.path, library.path.with_name("libmamba_plugin_register.so")):
        undefined = {symbol.split("@")[0] for symbol in _symbols(path, "--undefined-only")}
        assert not {name for name in undefined if re.search(r"nvinfer|getPluginRegistry|getLogger|INTERNAL", name)}
        needed = re.findall(r"NEEDED.*\[(.*)\]", _run("readelf", "-d", path.name, cwd=path.parent))
        assert not [name for name in needed if "nvinfer" in name or "tensorrt" in name]


def test_registering_library_says_what_is_missing(library):
    """Where TensorRT is not to be found it reports that, and the process lives on."""
    path = library.path.with_name("libmamba_plugin_register.so")
    python = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    done = subprocess.run(["python3", "-c", python, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if "no plugin is registered" not in done.stderr:
        pytest.skip("this machine has a TensorRT of that major version")
    major = library.label.split()[1].split(".")[0]
    assert f"libnvinfer.so.{major} cannot be opened" in done.stderr


# --- the rules ------------------------------------------------------------------------------------------------------


def _given(op_type: str) -> list[int]:
    """All masks of inputs that may be there, or a dozen of them."""
    optional = [i for i, tensor in enumerate(OPS[op_type].pattern) if tensor.optional]
    every = (1 << len(OPS[op_type].pattern)) - 1
    masks = range(1 << len(optional))
    return [
        every - sum(1 << slot for k, slot in enumerate(optional) if left_out >> k & 1)
        for left_out in (masks if len(masks) <= 8 else [0, masks[-1], *random.Random(op_type).sample(masks, 10)])
    ]


def _of_model(op_type: str, i: int) -> dict[str, int]:
    only = {"only_dtype": i % 3 - 1, "only_state_dtype": 1 - i % 2}
    return {"layers": 1 + i % 3, "all_logits": i % 2, **only} if OPS[op_type].layer_inputs else {}


NODES = [
    Node(op_type, {"given_inputs": given, **_of_model(op_type, i)})
    for op_type in OPS
    for i, given in enumerate(_given(op_type))
]


def _question(node: Node, kind: str, *words: Any) -> str:
    fields = [f"{name} {_letter(value)} {value}" for name, value in node.attributes.items()]
    return " ".join([node.op_type, *fields, ".", kind, *(str(word) for word in words)])


def _letter(value: Any) -> str:
    return {str: "z", float: "f"}.get(type(value), "i")


def _dtypes(node: Node, draw: random.Random, floats: tuple[str, ...], dtypes: tuple[str, ...]) -> list[str]:
    """Of inputs and outputs: right ones, or one of them drawn anew."""
    letters = {"T": draw.choice(floats), "S": draw.choice(floats)}
    found = [letters.get(tensor.dtype, tensor.dtype) for tensor in node.inputs + node.outputs]
    if draw.random() < 0.7:
        found[draw.randrange(len(found))] = draw.choice(dtypes)
    return found


def test_supported_dtypes_are_those_of_the_rules(library):
    draw = random.Random(1)
    dtypes = DTYPES[:-1] if library.interface == "v2" else DTYPES
    questions, expected = [], []
    for node in NODES:
        for _ in range(60):
            types = _dtypes(node, draw, library.floats, dtypes)
            for position in range(len(types)):
                questions.append(_question(node, "supports", position, *types))
                expected.append(str(int(node.supports(position, types.__getitem__))))
    assert library.ask(questions) == expected
    assert min(expected.count("0"), expected.count("1")) > 500


def test_only_the_linear_format_is_supported(library):
    node = Node("MambaSelectiveScan")
    types = ["float16"] * 2 + ["float32"] + ["float16"] * 2 + ["float32", "float16", "float32", "float32", "int32"]
    types += ["float16", "float32"]
    for kind, answer in (("supports", "1"), ("format", "0")):
        assert set(library.ask([_question(node, kind, i, *types) for i in range(len(types))])) == {answer}


def test_output_dtypes_are_those_of_the_rules(library):
    for activation in library.floats:
        for state in library.floats:
            questions, expected = [], []
            for node in NODES:
                letters = {"T": activation, "S": state}
                types = [letters.get(tensor.dtype, tensor.dtype) for tensor in node.inputs]
                questions.append(_question(node, "types", *types))
                expected.append(node.output_dtypes(types))
            assert [answer.split() for answer in library.ask(questions)] == expected


def test_output_shapes_are_those_of_the_rules(library):
    for node in NODES:
        ranks = [len(tensor.axes) for tensor in node.inputs]
        marked = [[f"{i}.{axis}" for axis in range(rank)] for i, rank in enumerate(ranks)]
        (answer,) = library.ask([_question(node, "shapes", *ranks)])
        assert [shape.split() for shape in answer.split("|")[:-1]] == node.output_shapes(
            marked, lambda a, b: f"{a}*{b}"
        )
    matrix_skip = Node("MambaSsdScan")
    (answer,) = library.ask([_question(matrix_skip, "shapes", 3, 3, 1, 3, 3, 2, 1, 4, 1)])
    assert answer.split() == "0.0 0.1 0.2 | 0.0 1.2 7.2 7.3 |".split()


@pytest.mark.parametrize("ranks", [(3,), (3, 1, 1), (2, 1), (3, 2)], ids=str)
def test_wrong_numbers_of_inputs_and_axes_are_refused(library, ranks):
    node = Node("MambaLastToken")
    with pytest.raises(PluginError):
        node.output_shapes([["?"] * rank for rank in ranks])
    (answer,) = library.ask([_question(node, "shapes", *ranks)])
    assert "refused" in answer
    if "8.5" not in library.label:  # the log of TensorRT says why
        assert "[mamba_deploy: MambaLastToken: " in answer
        assert "expected" in answer


def _sizes(node: Node, draw: random.Random) -> list[list[int]]:
    """Shapes of the inputs, right or with one size drawn anew."""
    size = {symbol: draw.randint(1, 5) for symbol in "BLCKDNPdMXERVQ"}
    size["G"] = node.attributes.get("n_groups", 1)
    size["H"] = size["G"] * draw.randint(1, 3) + (draw.random() < 0.1)
    size |= {"H*P": size["H"] * size["P"], "G*N": size["G"] * size["N"], "K-1": size["K"] - 1}
    shapes = []
    for tensor in node.inputs:
        axes = tensor.other_axes if tensor.other_axes and draw.random() < 0.5 else tensor.axes
        shapes.append([size[axis] for axis in axes])
    if draw.random() < 0.5:
        shape = draw.choice(shapes)
        shape[draw.randrange(len(shape))] = draw.randint(1, 5)
    return shapes


def _with_random_attributes(node: Node, draw: random.Random) -> Node:
    values = {
        "activation": draw.choice(["silu", "none"]),
        "dt_softplus": draw.randint(0, 1),
        "dt_min": draw.choice([0.0, 0.25]),
        "dt_max": draw.choice([0.5, math.inf]),
        "n_groups": draw.randint(1, 3),
        "eps": draw.choice([1e-5, 1e-6]),
        "norm_eps": draw.choice([-1.0, 1e-6]),
        "all_logits": draw.randint(0, 1),
    }
    chosen = {name: value for name, value in values.items() if name in node.op.attributes}
    return Node(node.op_type, {**node.attributes, **chosen})


def test_calls_reach_the_kernels_as_the_rules_say(library):
    draw = random.Random(2)
    asked = []
    for plain in NODES * 60:
        node = _with_random_attributes(plain, draw)
        letters = {"T": draw.choice(library.floats), "S": draw.choice(library.floats)}
        types = [letters.get(tensor.dtype, tensor.dtype) for tensor in node.inputs]
        asked.append((node, types, _sizes(node, draw)))
    answers = library.ask(
        [
            _question(node, "call", *types, "/", *(",".join(map(str, s)) for s in shapes))
            for node, types, shapes in asked
        ]
    )
    refused = 0
    for (node, types, shapes), answer in zip(asked, answers, strict=True):
        try:
            sizes = node.sizes(shapes)
        except PluginError:
            refused += 1
            assert answer.endswith("refused"), (node.op_type, shapes, answer)
            continue
        found = dict(word.split("=") for word in answer.split())
        expected = {name: str(size) for name, size in sizes.items()}
        expected |= {name: str(int(value is not None)) for name, value in _pointers(node)}
        first = next(i for i, tensor in enumerate(node.inputs) if tensor.dtype == "T")
        expected["dtype"] = str(FLOATS.index(types[first]))
        if "state_dtype" in found:
            state = next(i for i, tensor in enumerate(node.inputs) if tensor.name == "ssm_state")
            expected["state_dtype"] = str(FLOATS.index(types[state]))
        if "skip_per_channel" in found:
            skip = next((s for tensor, s in zip(node.inputs, shapes, strict=True) if tensor.name == "D"), [])
            expected["skip_per_channel"] = str(int(len(skip) == 2))
        attributes = node.attributes
        if node.op.layer_inputs:  # of both kinds of models
            attributes = {"norm_eps": -1.0, "dt_min": 0.0, "dt_max": math.inf, **attributes}
            expected = _both_kinds(expected) | {"head": "1", "each": "1"}
        for name in ("dt_softplus", "dt_min", "dt_max", "eps", "norm_eps", "all_logits"):
            if name in attributes:
                value = attributes[name]
                expected[name] = f"{ctypes.c_float(value).value if isinstance(value, float) else value:.9g}"
        if "activation" in found:
            expected["activation"] = str(("none", "silu").index(node.attributes["activation"]))
        assert found == expected
    assert 100 < refused < len(asked) - 100


def _pointers(node: Node) -> list[tuple[str, Any]]:
    """What is there, by the names that the stand-in prints."""
    slots, layers = iter(node.by_slot([1] * len(node.inputs))), range(node.attributes.get("layers", 0))
    named = [(tensor.name, next(slots)) for tensor in node.op.inputs]
    named += [(f"{i}.{tensor.name}", next(slots)) for i in layers for tensor in node.op.layer_inputs]
    named += [(tensor.name, 1) for tensor in node.op.outputs]
    return named + [(f"{i}.{tensor.name}", 1) for i in layers for tensor in node.op.layer_outputs]


def _both_kinds(of_one: dict[str, str]) -> dict[str, str]:
    """What the struct of a model holds, with zeros for what its kind does not have."""
    nothing = {f"{i}.{name}": "0" for i in range(int(of_one["layers"])) for name, _ in structs.MambaLayer._fields_}
    if "rank" in of_one:
        of_mamba2 = ("heads", "head_dim", "skip_per_channel", "pending", "pending_out", "pending_row")
        return nothing | dict.fromkeys(of_mamba2, "0") | {"groups": "1"} | of_one
    return nothing | {"rank": "0", "inner": str(int(of_one["heads"]) * int(of_one["head_dim"]))} | of_one


def test_workspace_suits_every_batch_up_to_the_largest(library):
    """The stand-in's kernels need most at batch 1, as real ones may that cut prompts in parts to fill the GPU."""
    for node in NODES:
        size = {"B": 7, "L": 9, "C": 2, "D": 2, "K": 4, "N": 3, "P": 2, "H": 2, "G": 1, "d": 4}
        size |= {"M": 8, "X": 4, "E": 5, "R": 2, "V": 6, "Q": 8}
        size |= {"H*P": 4, "G*N": 3, "K-1": 3}
        shapes = [[size[axis] for axis in tensor.axes] for tensor in node.inputs]
        types = [{"T": "float16", "S": "float32"}.get(tensor.dtype, tensor.dtype) for tensor in node.inputs]
        (answer,) = library.ask([_question(node, "workspace", *types, "/", *(",".join(map(str, s)) for s in shapes))])
        assert answer == str(256 * 9)


@pytest.mark.slow
# --- attributes -----------------------------------------------------------------------------------------------------


def test_parser_is_told_every_attribute(library):
    for op_type, op in OPS.items():
        (answer,) = library.ask([f"{op_type} . make"])
        assert answer.split() == [*op.attributes, "given_inputs", "1"]


@pytest.mark.parametrize(
    ("op_type", "name", "value"),
    [
        ("MambaCausalConv1d", "activation", "gelu"),
        ("MambaCausalConv1d", "activation", "sil"),
        ("MambaCausalConv1d", "activation", "silu2"),
        ("MambaCausalConv1d", "dt_softplus", 1),
        ("MambaCausalConv1d", "given_inputs", 0b01111),
        ("MambaCausalConv1d", "given_inputs", 0),
        ("MambaSelectiveScan", "dt_softplus", 2),
        ("MambaSsdScan", "dt_min", math.inf),
        ("MambaSsdScan", "dt_max", math.nan),
        ("MambaSsdScan", "dt_max", -1.0),
        ("MambaSsdScan", "n_groups", 0),
        ("MambaSsdScan", "n_groups", -8),
        ("MambaSsdScan", "chunk_size", 0),
        ("MambaModel", "layers", 0),
        ("MambaModel", "layers", 128),
        ("Mamba2Model", "all_logits", 2),
        ("Mamba2Model", "given_inputs", (1 << 19) - 2),
        ("Mamba2Model", "given_inputs", 1 << 19),
        ("MambaLastToken", "given_inputs", 0b01),
        ("MambaLastToken", "given_inputs", 0b111),
    ],
)
def test_wrong_attributes_are_refused_and_logged(library, op_type, name, value):
    attributes = {name: value}
    if name == "dt_min":
        attributes["dt_max"] = 1.0
    with pytest.raises(PluginError):
        Node(op_type, attributes)
    fields = " ".join(f"{key} {_letter(given)} {given}" for key, given in attributes.items())
    (answer,) = library.ask([f"{op_type} {fields} . make"])
    assert answer.endswith("refused")
    if "8.5" not in library.label:
        assert answer.startswith(f"[mamba_deploy: {op_type}: ")


@pytest.mark.parametrize("field", ["dt_softplus f 1", "dt_softplus z 1", "dt_max i 1", "unknown i 1"])
def test_attributes_of_a_wrong_type_are_refused(library, field):
    assert library.ask([f"MambaSsdScan {field} . make"])[0].endswith("refused")


def test_text_may_come_without_a_zero_at_its_end(library):
    for kind in "zs":  # TensorRT's own parser ends it with one
        (answer,) = library.ask(
            [f"MambaCausalConv1d activation {kind} none . call {'float32 ' * 4} int32 / 1,1,1 1,2 1 1,1,1 1"]
        )
        assert "activation=0" in answer
