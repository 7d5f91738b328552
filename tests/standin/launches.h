// Entry points for modules and launches.
#pragma once
#include "streams.h"
// Last, because the names and macros of the kernels are global.
#include "kernels.h"

namespace standin {

struct Function;
struct Module { Context* context; std::map<std::string, Function*> functions; };
struct Function { Module* module; std::string name; Kernel kernel; };

// Checks the version and the target of PTX, as a driver that compiles it does.
static void check_ptx(const char* text) {
    int major = 0, minor = 0, target = 0;
    if (sscanf(text, ".version %d.%d .target sm_%d", &major, &minor, &target) != 3)
        refuse(invalid_image, "the image is neither a fatbin nor PTX");
    int driver = (int)settings().driver;
    int newest = driver < 13000 ? 80 + driver % 1000 / 10 : 90;  // CUDA 12.0 has PTX 8.0, CUDA 13.0 has 9.0
    if (major * 10 + minor > newest) throw Failure{unsupported_ptx, false, ""};
    if (target > (int)settings().capability) throw Failure{no_binary_for_gpu, false, ""};
}

API cuModuleLoadData(void** out, const void* image) {
    return call([=] {
        const uint32_t fatbin_magic = 0xba55ed50;
        if (settings().reject_image) throw Failure{no_binary_for_gpu, false, ""};
        if (memcmp(image, &fatbin_magic, 4)) check_ptx((const char*)image);
        else if (settings().driver < 13000) throw Failure{unsupported_ptx, false, ""};
        auto* made = new Module{&context(), {}};
        driver().modules.insert(made);
        *out = made;
    });
}
API cuModuleUnload(void* handle) {
    return call(tolerant, [=] {
        Module* gone = &live<Module>(driver().modules, handle, "module");
        for (auto& [name, function] : gone->functions) driver().functions.erase(function), delete function;
        driver().modules.erase(gone);
        delete gone;
        if (sticky_code) throw Failure{sticky_code, true, ""};
    });
}
API cuModuleGetFunction(void** out, void* handle, const char* name) {
    return call([=] {
        Module& module = live<Module>(driver().modules, handle, "module");
        Kernel kernel = kernel_named(name);
        if (!kernel.run) refuse(not_found, "there is no kernel %s", name);
        Function*& function = module.functions[name];
        if (!function) driver().functions.insert(function = new Function{&module, name, kernel});
        *out = function;
    });
}
API cuFuncGetAttribute(int* value, int attribute, void* handle) {
    return call([=] {
        live<Function>(driver().functions, handle, "function");
        int capability = (int)settings().capability;
        *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : attribute == 5 || attribute == 6 ? capability : 0;
    });
}
API cuFuncSetAttribute(void*, int, int) { return call([] { context(); }); }
API cuFuncSetCacheConfig(void*, int) { return call([] { context(); }); }
API cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void* handle, int threads, size_t, unsigned) {
    return call([=] {
        live<Function>(driver().functions, handle, "function");
        *blocks = threads > 0 ? std::min(2048 / threads, 32) : 0;
    });
}
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* handle, int threads, size_t shared) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, handle, threads, shared, 0);
}

static void check_extents(const char* kernel, const standin_index& grid, const standin_index& block) {
    bool fits = volume(block) > 0 && volume(block) <= 1024 && block.x <= 1024 && block.y <= 1024 && block.z <= 64 &&
                volume(grid) > 0 && grid.x <= 2147483647u && grid.y <= 65535 && grid.z <= 65535;
    if (!fits)
        refuse(invalid_value, "kernel %s: no device takes %u x %u x %u blocks of %u x %u x %u threads", kernel, grid.x,
               grid.y, grid.z, block.x, block.y, block.z);
}
static uint64_t total(const std::vector<Range>& ranges) {
    uint64_t bytes = 0;
    for (const Range& range : ranges) bytes += range.end - range.begin;
    return bytes;
}
// Takes the marks of the launch from every allocation, and checks their order unless the kernel failed (`work` is 0).
static void finish_launch(Stream& stream, Work work) {
    for (Allocation* it : launch.touched) {
        auto read = take_ranges(*it, reads), written = take_ranges(*it, writes);
        it->touched_first = 1, it->touched_last = 0;
        uint64_t in = total(read), out = total(written);
        count("kernel_read_bytes") += in, count("kernel_written_bytes") += out;
        bool over_bus = it->kind == pinned_memory;
        count("kernel_bus_bytes") += over_bus ? in + out : 0;
        spend(stream, (in + out) * 1000 / (over_bus ? settings().bus : settings().dram));
        if (!work) read.clear(), written.clear();
        for (const Range& range : read) note_read(*it, range, work, stream.clock);
        for (const Range& range : written) note_write(*it, range, work, stream.clock);
        close_for_device(*it, read, written, work);
    }
}
static void run_kernel(const std::string& name, Runner run, Stream& stream, const void* arguments) {
    if (++count("launches") == settings().fail_launch)
        break_device(illegal_address, "STANDIN_FAIL_LAUNCH fails this launch of kernel %s", name.c_str());
    Work work = enqueue(stream, "kernel " + name);
    // The pinned memory that a kernel touches is not known before it runs: each allocation is opened at its first
    // touch.
    auto open = [](Allocation& it) { open_for_device(it, {0, it.bytes}, writes); };
    begin_touching(name.c_str(), stream.context->device, open);
    try {
        run(arguments, settings().reverse);
    } catch (...) {
        finish_launch(stream, 0);
        throw;
    }
    finish_launch(stream, work);
}
API cuLaunchKernel(void* handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned,
                   void* stream_handle, void** arguments, void**) {
    return call([=] {
        Function& function = live<Function>(driver().functions, handle, "function");
        Stream& stream = own_stream(stream_handle);
        const char* name = function.name.c_str();
        if (function.module->context != stream.context) refuse(invalid_handle, "kernel %s is of another context", name);
        check_extents(name, {gx, gy, gz}, {bx, by, bz});
        // A launch copies its arguments: those of a graph do not change.
        const char* values = (const char*)arguments[0];
        std::vector<char> copied(values, values + function.kernel.bytes);
        take(stream, [=, name = function.name, run = function.kernel.run](Stream& stream) {
            gridDim = {gx, gy, gz}, blockDim = {bx, by, bz};
            run_kernel(name, run, stream, copied.data());
        });
    });
}

}  // namespace standin
