// Cases of the self test: captures of streams into graphs.
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
    meets(fill(a, 1, 64, s));
    meets(cu("cuEventRecord", done, s));
    meets(cu("cuStreamWaitEvent", s, done, 0u));
    int mode = RELAXED;
    OK(cu("cuThreadExchangeStreamCaptureMode", &mode));
    OK(synchronize(other));
    meets(cu("cuCtxSynchronize"));  // forbidden in every mode
    EXPECT(end_capture(s), 0);
    OK(cu("cuMemFree_v2", a));
}
CASE(the_legacy_stream_would_wait_for_a_blocking_one, "", nullptr) {
    context_of(0);
    Handle s = stream(0);
    int status = 0;
    OK(cu("cuStreamBeginCapture_v2", s, (int)RELAXED));
    EXPECT(cu("cuStreamIsCapturing", Handle(nullptr), &status), IMPLICIT);
    EXPECT(end_capture(s), 0);
    EXPECT(capturing(nullptr), 0);
}
CASE(freed_while_work_may_run, "", "freeing device allocation 1 (64 bytes") {
    context_of(0);
    Pointer a = device(64);
    OK(fill(a, 1, 64, stream()));
    EXPECT(cu("cuMemFree_v2", a), FAILED);
    expect_broken(FAILED);
}
