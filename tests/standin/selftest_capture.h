// Cases of the self test: captures of streams into graphs, and launches of the graphs.
#pragma once
#include "selftest.h"

enum { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2, CAPTURED = 900, INVALIDATED = 901, IMPLICIT = 906 };

static int capturing(Handle stream) {
    int status = -1;
    OK(cu("cuStreamIsCapturing", stream, &status));
    return status;
}
static int end_capture(Handle stream) {
    Handle graph = nullptr;
    int code = cu("cuStreamEndCapture", stream, &graph);
    EXPECT(graph != nullptr, code == 0);
    if (graph) OK(cu("cuGraphDestroy", graph));
    return code;
}
// Calls what a capture forbids, on a thread with this mode, and returns the code.
static int allocate_in_thread(Handle context, int mode) {
    int code = -1;
    std::thread([&] {
        OK(cu("cuCtxSetCurrent", context));
        OK(cu("cuThreadExchangeStreamCaptureMode", &mode));
        EXPECT(mode, GLOBAL);  // that of a new thread
        Pointer made;
        code = cu("cuMemAlloc_v2", &made, (size_t)64);
    }).join();
    return code;
}

CASE(a_capture_ends_with_a_graph, "", "no capture of this stream has begun") {
    context_of(0);
    Handle s = stream(), other = stream();
    EXPECT(capturing(s), 0);
    OK(cu("cuStreamBeginCapture_v2", s, (int)GLOBAL));
    EXPECT(capturing(s), 1);
    EXPECT(capturing(other), 0);
    EXPECT(capturing(nullptr), 0);
    EXPECT(end_capture(s), 0);
    EXPECT(capturing(s), 0);
    EXPECT(cu("cuStreamEndCapture", s, (Handle*)nullptr), INVALID);
}
CASE(an_allocation_of_any_thread_invalidates_a_capture, "", "cuMemAlloc, while a stream is captured") {
    Handle context = context_of(0);
    Handle s = stream();
    for (int mode : {GLOBAL, THREAD_LOCAL}) {
        OK(cu("cuStreamBeginCapture_v2", s, (int)GLOBAL));
        EXPECT(allocate_in_thread(context, RELAXED), 0);
        EXPECT(capturing(s), 1);
        EXPECT(allocate_in_thread(context, mode), mode == GLOBAL ? CAPTURED : 0);
        EXPECT(capturing(s), mode == GLOBAL ? 2 : 1);
        EXPECT(end_capture(s), mode == GLOBAL ? INVALIDATED : 0);
    }
    OK(cu("cuStreamBeginCapture_v2", s, (int)THREAD_LOCAL));
    EXPECT(allocate_in_thread(context, GLOBAL), 0);
    EXPECT(end_capture(s), 0);
}
CASE(calls_that_captures_forbid, "", "while a stream is captured") {
    context_of(0);
    Handle s = stream(), other = stream(), done = event_after(other);
    Pointer a = device(64);
    uint8_t* host = pinned(64);
    auto meets = [&](int code) {
        EXPECT(code, CAPTURED);
        EXPECT(end_capture(s), INVALIDATED);
        OK(cu("cuStreamBeginCapture_v2", s, (int)GLOBAL));
    };
    OK(cu("cuStreamBeginCapture_v2", s, (int)GLOBAL));
    void* made;
    meets(cu("cuMemHostAlloc", &made, (size_t)64, 0u));
    meets(cu("cuMemFree_v2", a));
    meets(cu("cuMemFreeHost", (void*)host));
    meets(cu("cuEventSynchronize", done));
    meets(cu("cuEventQuery", done));
    meets(synchronize(other));
    meets(cu("cuStreamQuery", other));
    meets(synchronize(s));
    meets(cu("cuEventRecord", done, s));
    meets(cu("cuStreamWaitEvent", s, done, 0u));
    int mode = RELAXED;
    OK(cu("cuThreadExchangeStreamCaptureMode", &mode));
    OK(synchronize(other));
    meets(cu("cuCtxSynchronize"));  // forbidden in every mode
    EXPECT(end_capture(s), 0);
    OK(cu("cuMemFree_v2", a));
}
CASE(the_legacy_stream_would_wait_for_a_blocking_one, "", "work on the default stream, while a blocking stream is") {
    context_of(0);
    Handle s = stream(0);
    int status = 0;
    OK(cu("cuStreamBeginCapture_v2", s, (int)RELAXED));
    EXPECT(cu("cuStreamIsCapturing", Handle(nullptr), &status), IMPLICIT);
    EXPECT(end_capture(s), 0);
    OK(cu("cuStreamBeginCapture_v2", s, (int)RELAXED));
    EXPECT(download(&status, device(64), 4, nullptr), IMPLICIT);
    EXPECT(end_capture(s), INVALIDATED);
    EXPECT(capturing(nullptr), 0);
}
// Captures what `work` queues on a stream, and returns the graph for launches.
template <class Work> static Handle captured(Handle s, Work work) {
    Handle graph, launchable;
    OK(cu("cuStreamBeginCapture_v2", s, (int)RELAXED));
    work();
    OK(cu("cuStreamEndCapture", s, &graph));
    OK(cu("cuGraphInstantiateWithFlags", &launchable, graph, 0ull));
    OK(cu("cuGraphDestroy", graph));
    return launchable;
}
CASE(captured_work_runs_at_each_launch, "", "is not a live graph") {
    context_of(0);
    Handle s = stream(), other = stream();
    const size_t n = 100, bytes = 4 * n;
    Pointer a = device(bytes), b = device(bytes), sum = device(bytes);
    auto from = (float*)pinned(bytes);
    std::vector<float> got(n);
    Add arguments{sum, a, b, n};
    uint64_t launches = counted("launches");
    Handle graph = captured(s, [&] {
        OK(upload(a, from, bytes, s));
        OK(fill(b, 0, bytes, s));
        OK(launch("add", arguments, s));
        OK(move(b, sum, bytes, s));
        arguments.n = 0;  // copied already
    });
    EXPECT(counted("launches"), launches);
    for (float value : {1.0f, 2.0f}) {
        for (size_t i = 0; i < n; i++) from[i] = value;
        OK(cu("cuGraphLaunch", graph, other));
        OK(download(got.data(), b, bytes, other));
        for (float each : got) EXPECT(each == value, 1);
    }
    EXPECT(counted("launches"), launches + 2);
    OK(cu("cuGraphExecDestroy", graph));
    EXPECT(cu("cuGraphLaunch", graph, other), HANDLE);
}
CASE(a_launch_is_ordered_as_other_work, "", "kernel copy_vectors on non-blocking stream") {
    context_of(0);
    Handle s = stream(), other = stream();
    Pointer a = device(64), b = device(64);
    Handle graph = captured(s, [&] { OK(launch("copy_vectors", Vectors{b, a, 4}, s)); });
    OK(fill(a, 1, 64, s));
    EXPECT(cu("cuGraphLaunch", graph, other), FAILED);
}
static int destroyed;
CASE(a_user_object_lives_as_long_as_a_graph, "", "a callback of the driver calls the driver") {
    context_of(0);
    Handle s = stream(), launchable;
    destroyed = 0;
    auto destroy = +[](void* value) { destroyed = *(int*)value, EXPECT(cu("cuCtxSynchronize"), 800); };
    int value = 7;
    launchable = captured(s, [&] {
        int status;
        Handle object, graph;
        OK(cu("cuUserObjectCreate", &object, (void*)&value, destroy, 1u, 1u));
        OK(cu("cuStreamGetCaptureInfo_v3", s, &status, (uint64_t*)nullptr, &graph, (void**)nullptr, (void**)nullptr,
              (size_t*)nullptr));
        EXPECT(status, 1);
        OK(cu("cuGraphRetainUserObject", graph, object, 1u, 1u));
    });
    EXPECT(destroyed, 0);
    OK(cu("cuGraphExecDestroy", launchable));
    EXPECT(destroyed, 7);
}
CASE(freed_while_work_may_run, "", "freeing device allocation 1 (64 bytes") {
    context_of(0);
    Pointer a = device(64);
    OK(fill(a, 1, 64, stream()));
    EXPECT(cu("cuMemFree_v2", a), FAILED);
    expect_broken(FAILED);
}
