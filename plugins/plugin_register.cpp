// Registers the operators when the library is loaded, for what only opens libraries: trtexec --staticPlugins,
// LD_PRELOAD, ONNX Runtime's trt_extra_plugin_lib_paths, ctypes, and TensorRT 8.5, which cannot load a plugin library.
// A library of its own, linked with the plugin library: loadLibrary refuses one whose plugins are registered already.
// It belongs to the major version of the TensorRT whose headers it is compiled with; the registry differs from one to
// the next.

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>

#define MAMBA_TEXT_OF(macro) #macro
#define MAMBA_TEXT(macro) MAMBA_TEXT_OF(macro)
#ifdef TRT_MAJOR_RTX
#define MAMBA_TENSORRT "libtensorrt_rtx.so." MAMBA_TEXT(TRT_MAJOR_RTX)
#else
#define MAMBA_TENSORRT "libnvinfer.so." MAMBA_TEXT(NV_TENSORRT_MAJOR)
#endif

#if NV_TENSORRT_MAJOR == 8
using CreatorInterface = nvinfer1::IPluginCreator;
#define MAMBA_CREATORS getPluginCreators
#else
using CreatorInterface = nvinfer1::IPluginCreatorInterface;
#define MAMBA_CREATORS getCreators
#endif

extern "C" CreatorInterface* const* MAMBA_CREATORS(int32_t& count);

namespace {

// Of the TensorRT with the soname that fits these headers: opened again, it is the one the process has; under
// LD_PRELOAD it comes here first. Not linked, and not whatever the process shows: trtexec and ONNX Runtime keep its
// symbols to themselves, and the registry of another major version would crash.
nvinfer1::IPluginRegistry* registry() {
    void* const library = dlopen(MAMBA_TENSORRT, RTLD_LAZY);
    void* const function = library ? dlsym(library, "getPluginRegistry") : nullptr;
    return function ? reinterpret_cast<decltype(&getPluginRegistry)>(function)() : nullptr;
}

bool const registered = [] {
    nvinfer1::IPluginRegistry* const into = registry();
    if (!into) {
        std::fprintf(stderr, "mamba_deploy: no plugin is registered: %s cannot be opened\n", MAMBA_TENSORRT);
        return false;
    }
    int32_t count = 0;
    CreatorInterface* const* const creators = MAMBA_CREATORS(count);
    bool all = true;
    for (int32_t i = 0; i < count; ++i) all &= into->registerCreator(*creators[i], "");
    return all;
}();

}  // namespace
