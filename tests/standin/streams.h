// Entry points for streams, events, and the host's waits.
#pragma once
#include <chrono>

#include "capture.h"

namespace standin {

// Waits on the host until a clock is reached, as a synchronization does.
static void host_waits(const Clock& clock, bool sleeps = true) {
    count("host_waits")++;
    if (!sleeps && !ordering().host.covers(clock)) count("spins")++;
    host_reaches(clock);
}
// Answers a query: "not ready" a few times, unless the host has waited for the work already.
static void query(const Clock& clock, uint64_t& refusals) {
    if (ordering().host.covers(clock)) return;
    if (refusals > 0) {
        refusals--;
        throw Failure{not_ready, false, ""};
    }
    host_reaches(clock);
}
API cuCtxSynchronize() {
    return call([] {
        check_captures("cuCtxSynchronize");
        check_no_capture(context());
        host_waits(context().everything, false);
    });
}

// ---- Streams and events

API cuStreamCreateWithPriority(void** out, unsigned flags, int) {
    return call([=] {
        Stream* made = flags & 1 ? new_stream(context(), Stream::non_blocking, "non-blocking stream")
                                 : new_stream(context(), Stream::blocking, "blocking stream");
        driver().streams.insert(made);
        *out = made;
    });
}
API cuStreamCreate(void** out, unsigned flags) { return cuStreamCreateWithPriority(out, flags, 0); }
API cuStreamDestroy_v2(void* handle) {
    return call(tolerant, [=] {
        Stream* gone = &live<Stream>(driver().streams, handle, "stream");
        driver().streams.erase(gone);
        delete gone;
        if (sticky_code) throw Failure{sticky_code, true, ""};
    });
}
API cuStreamSynchronize(void* stream) {
    return call([=] {
        check_captures("cuStreamSynchronize");
        host_waits(working_stream(stream).clock, false);
    });
}
API cuStreamQuery(void* handle) {
    return call([=] {
        check_captures("cuStreamQuery");
        Stream& stream = working_stream(handle);
        query(stream.clock, stream.queries);
    });
}
API cuStreamWaitEvent(void* stream, void* event, unsigned) {
    return call([=] { wait_for(not_capturing(stream_of(stream)), event_of(event)); });
}

static double milliseconds_now() {
    auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double, std::milli>(now).count();
}
API cuEventCreate(void** out, unsigned flags) {
    return call([=] {
        auto* made = new Event{&context(), !(flags & 2), false, (flags & 1) != 0, {}, 0, 0};
        driver().events.insert(made);
        *out = made;
    });
}
API cuEventDestroy_v2(void* handle) {
    return call(tolerant, [=] {
        Event* gone = &event_of(handle);
        driver().events.erase(gone);
        delete gone;
        if (sticky_code) throw Failure{sticky_code, true, ""};
    });
}
API cuEventRecord(void* handle, void* stream_handle) {
    return call([=] {
        Event& event = event_of(handle);
        Stream& stream = not_capturing(stream_of(stream_handle));
        if (event.context != stream.context) refuse(invalid_handle, "event and stream are of different contexts");
        count("events")++;
        record(event, stream);
        event.milliseconds = milliseconds_now();
    });
}
API cuEventSynchronize(void* event) {
    return call([=] {
        check_captures("cuEventSynchronize");
        host_waits(event_of(event).clock, event_of(event).sleeps);
    });
}
API cuEventQuery(void* handle) {
    return call([=] {
        check_captures("cuEventQuery");
        Event& event = event_of(handle);
        query(event.clock, event.queries);
    });
}
API cuEventElapsedTime_v2(float* milliseconds, void* first, void* last) {
    return call([=] {
        Event &start = event_of(first), &end = event_of(last);
        if (!start.timed || !end.timed || !start.recorded || !end.recorded)
            refuse(invalid_handle, "elapsed time needs two recorded events that were created with timing");
        const Clock& host = ordering().host;
        if (!host.covers(start.clock) || !host.covers(end.clock)) throw Failure{not_ready, false, ""};
        *milliseconds = (float)(end.milliseconds - start.milliseconds);
    });
}
API cuEventElapsedTime(float* milliseconds, void* first, void* last) {
    return cuEventElapsedTime_v2(milliseconds, first, last);
}

}  // namespace standin
