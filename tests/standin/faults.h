// Settings from the environment, errors (exceptions inside, codes outside), and counters.
#pragma once
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <map>
#include <string>

namespace standin {

// CUresult values, as in cuda.h.
enum Code {
    success = 0, invalid_value = 1, out_of_memory = 2, not_initialized = 3, no_device = 100, invalid_device = 101,
    invalid_image = 200, invalid_context = 201, no_binary_for_gpu = 209, unsupported_ptx = 222, invalid_handle = 400,
    not_found = 500, not_ready = 600, illegal_address = 700, misaligned_address = 716, launch_failed = 719,
    already_registered = 712, not_permitted = 800, not_supported = 801, capture_unsupported = 900,
    capture_invalidated = 901, capture_implicit = 906,
};

struct CodeName { int code; const char *name, *text; };
static const CodeName code_names[] = {
    {success, "CUDA_SUCCESS", "no error"},
    {invalid_value, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {out_of_memory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {not_initialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {no_device, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {invalid_device, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {invalid_image, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {invalid_context, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {no_binary_for_gpu, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {unsupported_ptx, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the PTX was compiled with an unsupported toolchain"},
    {invalid_handle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {not_found, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {not_ready, "CUDA_ERROR_NOT_READY", "device not ready"},
    {illegal_address, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {misaligned_address, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {already_registered, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part of the memory is pinned already"},
    {launch_failed, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {not_permitted, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {not_supported, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {capture_unsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {capture_invalidated, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "a previous error has ended the capture"},
    {capture_implicit, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", "the legacy stream would wait for a captured one"},
    // Returned only if STANDIN_INIT asks for them.
    {34, "CUDA_ERROR_STUB_LIBRARY", "CUDA driver is a stub library"},
    {46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"},
    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

static inline uint64_t environment(const char* name, uint64_t otherwise) {
    const char* text = getenv(name);
    return text && *text ? strtoull(text, nullptr, 0) : otherwise;
}

struct Settings {
    uint64_t devices = environment("STANDIN_DEVICES", 2), init = environment("STANDIN_INIT", 0);
    uint64_t driver = environment("STANDIN_DRIVER", 13000), capability = environment("STANDIN_CAPABILITY", 90);
    uint64_t memory = environment("STANDIN_MEMORY", 8ull << 30), pinned = environment("STANDIN_PINNED", 8ull << 30);
    uint64_t queries = environment("STANDIN_QUERIES", 1), reverse = environment("STANDIN_REVERSE", 0);
    uint64_t fail_launch = environment("STANDIN_FAIL_LAUNCH", 0), fail_copy = environment("STANDIN_FAIL_COPY", 0);
    uint64_t bus = environment("STANDIN_BUS", 50000), dram = environment("STANDIN_DRAM", 3000000);  // bytes per us
    uint64_t can_register = environment("STANDIN_REGISTER", 1);
    uint64_t fail_alloc = environment("STANDIN_FAIL_ALLOC", 0), reject_image = environment("STANDIN_REJECT_IMAGE", 0);
};
static inline const Settings& settings() {
    static const Settings once;
    return once;
}

// Counters by name. State is never destroyed: other threads may still call while the process exits.
static inline std::map<std::string, uint64_t>& counters() {
    static auto* all = new std::map<std::string, uint64_t>{
        {"launches", 0}, {"copies", 0}, {"memsets", 0}, {"h2d_bytes", 0}, {"d2h_bytes", 0}, {"d2d_bytes", 0},
        {"allocations", 0}, {"device_bytes", 0}, {"peak_device_bytes", 0}, {"pinned_bytes", 0},
        {"peak_pinned_bytes", 0}, {"events", 0}, {"host_waits", 0}, {"kernel_read_bytes", 0},
        {"kernel_written_bytes", 0}, {"kernel_bus_bytes", 0}, {"spins", 0}, {"registered_bytes", 0}};
    return *all;
}
static inline uint64_t& count(const char* what) { return counters().at(what); }

// Error on its way out of an entry point. A sticky one is returned by every later call, as on a broken device.
struct Failure {
    int code;
    bool sticky;
    std::string text;
};
static int sticky_code = success;

#define STANDIN_MESSAGE __attribute__((cold, format(printf, 2, 3)))
[[noreturn]] static inline void fail(int code, bool sticky, const char* pattern, va_list arguments) {
    char text[1024];
    vsnprintf(text, sizeof text, pattern, arguments);
    va_end(arguments);
    throw Failure{code, sticky, text};
}
// Refuses a call that is wrong, before it has any effect.
[[noreturn]] STANDIN_MESSAGE static inline void refuse(int code, const char* pattern, ...) {
    va_list arguments;
    va_start(arguments, pattern);
    fail(code, false, pattern, arguments);
}
// Fails on the device: the error is sticky.
[[noreturn]] STANDIN_MESSAGE static inline void break_device(int code, const char* pattern, ...) {
    va_list arguments;
    va_start(arguments, pattern);
    fail(code, true, pattern, arguments);
}
static inline int report(const Failure& failure) {
    const char* text = failure.text.c_str();
    if (*text) fprintf(stderr, "stand-in driver: error %d: %s\n", failure.code, text);
    if (failure.sticky && sticky_code == success) sticky_code = failure.code;
    return failure.code;
}

}  // namespace standin
