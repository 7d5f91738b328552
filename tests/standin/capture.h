// Captures of streams into graphs: which calls they forbid. The graphs are empty: work on a captured stream is refused.
#pragma once
#include "handles.h"

namespace standin {

enum CaptureMode { capture_global, capture_thread_local, capture_relaxed };

struct Capture {
    CaptureMode mode;
    std::thread::id thread;
    bool valid;
};
static std::map<const Stream*, Capture>& captures() {
    static auto* all = new std::map<const Stream*, Capture>;
    return *all;
}
static thread_local CaptureMode capture_mode = capture_global;

// Forbids a call that may interfere with captures. Those that it meets are invalid from then on.
static void check_captures(const char* name) {
    if (capture_mode == capture_relaxed) return;
    bool met = false;
    for (auto& [stream, it] : captures()) {
        bool own = it.thread == std::this_thread::get_id();
        bool forbids = own ? it.mode != capture_relaxed : it.mode == capture_global && capture_mode == capture_global;
        if (forbids) it.valid = false, met = true;
    }
    if (met) refuse(capture_unsupported, "%s, while a stream is captured", name);
}
// Forbids to wait for a whole context in which a stream is captured.
static void check_no_capture(const Context& context) {
    bool met = false;
    for (auto& [stream, it] : captures())
        if (stream->context == &context) it.valid = false, met = true;
    if (met) refuse(capture_unsupported, "a wait for a device on which a stream is captured");
}
static Stream& not_capturing(Stream& stream) {
    auto at = captures().find(&stream);
    if (at == captures().end()) return stream;
    at->second.valid = false;
    const char* name = ordering().lanes[stream.lane].c_str();
    refuse(capture_unsupported, "%s is captured, and the stand-in keeps no work for a graph", name);
}
// Returns a stream that takes work. It must be of the current context; for a wait it need not be.
static Stream& working_stream(void* handle) {
    Stream& stream = not_capturing(stream_of(handle));
    if (stream.context == &context()) return stream;
    const char* name = ordering().lanes[stream.lane].c_str();
    refuse(invalid_handle, "%s is used in the context of device %d", name, current->device);
}

API cuStreamBeginCapture_v2(void* handle, int mode) {
    return call([=] {
        Stream& stream = working_stream(handle);
        if (stream.kind == Stream::legacy) refuse(capture_unsupported, "the legacy default stream is not captured");
        captures()[&stream] = {(CaptureMode)mode, std::this_thread::get_id(), true};
    });
}
API cuStreamEndCapture(void* handle, void** graph) {
    return call([=] {
        auto at = captures().find(&stream_of(handle));
        if (at == captures().end()) refuse(invalid_value, "no capture of this stream has begun");
        bool valid = at->second.valid;
        captures().erase(at);
        *graph = valid ? new char : nullptr;
        if (!valid) throw Failure{capture_invalidated, false, ""};
    });
}
API cuGraphDestroy(void* graph) { return delete (char*)graph, success; }
API cuStreamIsCapturing(void* handle, int* status) {
    return call([=] {
        Stream& stream = stream_of(handle);
        auto at = captures().find(&stream);
        *status = at == captures().end() ? 0 : at->second.valid ? 1 : 2;
        if (stream.kind != Stream::legacy) return;
        for (auto& [other, it] : captures())
            if (other->context == stream.context && other->kind == Stream::blocking)
                throw Failure{capture_implicit, false, ""};
    });
}
API cuThreadExchangeStreamCaptureMode(int* mode) {
    int before = capture_mode;
    capture_mode = (CaptureMode)*mode;
    *mode = before;
    return success;
}

}  // namespace standin
