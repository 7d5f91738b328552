// Captures of streams into graphs: which calls they forbid, and the work that they keep. A capture has one stream, so
// events on it are refused.
#pragma once
#include "graphs.h"

namespace standin {

enum CaptureMode { capture_global, capture_thread_local, capture_relaxed };

struct Capture {
    CaptureMode mode;
    std::thread::id thread;
    bool valid;
    Graph* graph;
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
    refuse(capture_unsupported, "%s is captured, and this call is not part of a graph", name);
}
// Does work on a stream now, or keeps it for the graph if the stream is captured.
static void take(Stream& stream, const std::function<void(Stream&)>& work) {
    auto at = captures().find(&stream);
    if (at == captures().end()) return work(stream);
    if (!at->second.valid) throw Failure{capture_invalidated, false, ""};
    at->second.graph->work.push_back(work);
}
// Forbids work on the legacy default stream that a captured blocking stream would wait for.
static void check_blocking(const Stream& legacy) {
    bool met = false;
    for (auto& [stream, it] : captures())
        if (stream->context == legacy.context && stream->kind == Stream::blocking) it.valid = false, met = true;
    if (met) refuse(capture_implicit, "work on the default stream, while a blocking stream is captured");
}
// Returns a stream of the current context. Only a wait may be for another.
static Stream& own_stream(void* handle) {
    Stream& stream = stream_of(handle);
    if (stream.kind == Stream::legacy) check_blocking(stream);
    if (stream.context == &context()) return stream;
    const char* name = ordering().lanes[stream.lane].c_str();
    refuse(invalid_handle, "%s is used in the context of device %d", name, current->device);
}
static Stream& working_stream(void* handle) { return not_capturing(own_stream(handle)); }

API cuStreamBeginCapture_v2(void* handle, int mode) {
    return call([=] {
        Stream& stream = working_stream(handle);
        if (stream.kind == Stream::legacy) refuse(capture_unsupported, "the legacy default stream is not captured");
        captures()[&stream] = {(CaptureMode)mode, std::this_thread::get_id(), true, new_graph({})};
    });
}
API cuStreamEndCapture(void* handle, void** graph) {
    return call([=] {
        auto at = captures().find(&stream_of(handle));
        if (at == captures().end()) refuse(invalid_value, "no capture of this stream has begun");
        Capture ended = at->second;
        captures().erase(at);
        *graph = ended.valid ? ended.graph : nullptr;
        if (ended.valid) return;
        delete_graph(ended.graph);
        throw Failure{capture_invalidated, false, ""};
    });
}
// Gives the graph that a capture makes, to which a caller may add user objects.
API cuStreamGetCaptureInfo_v3(void* handle, int* status, uint64_t*, void** graph, void**, void**, size_t*) {
    return call([=] {
        auto at = captures().find(&stream_of(handle));
        *status = at == captures().end() ? 0 : at->second.valid ? 1 : 2;
        if (graph && *status == 1) *graph = at->second.graph;
    });
}
API cuGraphLaunch(void* graph, void* handle) {
    return call([=] {
        Stream& stream = working_stream(handle);
        for (auto& work : graph_of(graph).work) work(stream);
    });
}
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
