// Cases of the self test: streams, events, waits, and the host's view of pinned memory.
#pragma once
#include "selftest.h"

static void one_stream() {
    context_of(0);
    const size_t n = 5001, bytes = n * 4;
    Pointer a = device(bytes), b = device(bytes), c = device(bytes);
    Handle s = stream();
    std::vector<float> sum(n);
    OK(upload(a, ramp(n, 1).data(), bytes, s));
    OK(upload(b, ramp(n, 0.5).data(), bytes, s));
    OK(launch("add", Add{c, a, b, n}, s, 79));  // over several pages, in either order of the blocks
    OK(download(sum.data(), c, bytes, s));
    EXPECT(differing_sums(sum.data(), n), 0);
    EXPECT(counted("launches"), 1);
    EXPECT(counted("copies"), 3);
    EXPECT(counted("h2d_bytes"), 2 * bytes);
    EXPECT(counted("d2h_bytes"), bytes);
    EXPECT(counted("kernel_read_bytes"), 2 * bytes);
    EXPECT(counted("kernel_written_bytes"), bytes);
    EXPECT(counted("device_bytes"), 3 * bytes);
    EXPECT(counted("host_waits"), 1);  // the copy to pageable memory
    for (Pointer it : {a, b, c}) OK(cu("cuMemFree_v2", it));
    EXPECT(counted("device_bytes"), 0);
    EXPECT(counted("peak_device_bytes"), 3 * bytes);
}
CASE(one_stream_computes, "", nullptr) { one_stream(); }
CASE(one_stream_computes_in_reverse, "STANDIN_REVERSE=1", nullptr) { one_stream(); }
CASE(reverse_order_shows_dependent_threads, "STANDIN_REVERSE=1", nullptr) {
    context_of(0);
    Pointer a = device(48);
    for (unsigned blocks : {1, 2}) {
        uint8_t host[48] = {};
        host[0] = 1, host[16] = 2;
        OK(upload(a, host, 48, nullptr));
        OK(launch("copy_vectors", Vectors{a + 16, a, 2}, nullptr, blocks, 2 / blocks));
        OK(download(host, a, 48, nullptr));
        EXPECT(host[32], 2);  // forwards it would be 1
    }
}

// Orders three streams by events. Data in pinned memory is visible after the wait and not before.
CASE(events_order_streams, "", nullptr) {
    context_of(0);
    const size_t n = 512, bytes = n * 4;
    Pointer a = device(bytes), c = device(bytes);
    uint8_t *source = pinned(bytes), *target = pinned(bytes);
    Handle in = stream(), work = stream(), out = stream();
    for (int step = 0; step < 3; step++) {
        memcpy(source, ramp(n, 0.75).data(), bytes);
        order(in, work);
        OK(upload(a, source, bytes, in));
        order(work, in), order(work, out);
        OK(launch("add", Add{c, a, a, n}, work));
        order(out, work);
        OK(download(target, c, bytes, out));
        Handle done = event_after(out);
        EXPECT(target[7], 0xA5);
        EXPECT(cu("cuEventQuery", done), NOT_READY);
        OK(cu("cuEventQuery", done));
        EXPECT(differing_sums((float*)target, n), 0);
    }
    OK(cu("cuMemFreeHost", (void*)source));
    OK(cu("cuMemFreeHost", (void*)target));
    EXPECT(counted("pinned_bytes"), 0);
    EXPECT(counted("host_waits"), 0);
}

CASE(default_and_blocking_streams_wait_for_each_other, "", nullptr) {
    context_of(0);
    Pointer a = device(64);
    Handle first = stream(0), second = stream(0);
    Handle legacy = nullptr, same = Handle(1), of_thread = Handle(2);
    for (Handle it : {first, legacy, second, same, of_thread, legacy, first}) OK(fill(a, 1, 64, it));
    OK(cu("cuStreamDestroy_v2", first));
    OK(fill(a, 1, 64, nullptr));
    OK(cu("cuCtxSynchronize"));
    OK(cu("cuMemFree_v2", a));
}
CASE(default_stream_does_not_order_non_blocking_ones, "", "which cuMemsetD8Async on legacy default stream 1 of") {
    context_of(0);
    Pointer a = device(64);
    Handle s = stream();
    OK(fill(a, 1, 64, nullptr));
    EXPECT(fill(a, 1, 64, s), FAILED);
}
CASE(non_blocking_streams_do_not_order_the_default_one, "", "which cuMemsetD8Async on non-blocking stream") {
    context_of(0);
    Pointer a = device(64);
    Handle s = stream();
    OK(fill(a, 1, 64, s));
    EXPECT(fill(a, 1, 64, nullptr), FAILED);
}
CASE(per_thread_streams_are_separate, "", "per-thread default stream") {
    Handle context = context_of(0);
    Pointer a = device(64);
    OK(fill(a, 1, 64, Handle(2)));
    std::thread([=] {
        OK(cu("cuCtxSetCurrent", context));
        EXPECT(fill(a, 2, 64, Handle(2)), FAILED);
    }).join();
}
CASE(write_after_write, "", "copy_missing_wait") {
    fprintf(stderr, "copy_missing_wait\n");
    context_of(0);
    Pointer a = device(100);
    std::vector<char> host(100);
    OK(upload(a, host.data(), 50, stream()));
    OK(upload(a + 50, host.data(), 50, stream()));  // neighbouring bytes do not conflict
    EXPECT(upload(a + 49, host.data(), 2, stream()), FAILED);
    expect_broken(FAILED);
    OK(cu("cuMemFree_v2", a));
}
CASE(read_after_write, "", "reads bytes [0, 64) of device allocation 1 (64 bytes at 0x") {
    context_of(0);
    Pointer a = device(64), b = device(64);
    OK(fill(a, 1, 64, stream()));
    EXPECT(launch("add", Add{b, a, a, 16}, stream()), FAILED);
}
CASE(write_after_read, "", "cuMemsetD8Async on non-blocking stream 3 of device 0 writes bytes [4, 64) of") {
    context_of(0);
    Pointer a = device(256), b = device(256);
    OK(fill(a, 0, 256, nullptr)), OK(cu("cuCtxSynchronize"));
    OK(launch("add", Add{b, a + 4, a + 32, 8}, stream()));
    EXPECT(fill(a + 4, 1, 64, stream()), FAILED);
}
CASE(kernel_then_copy_without_wait, "", "which kernel add on non-blocking stream 2 of device 0 writes") {
    context_of(0);
    Pointer a = device(64);
    uint8_t* host = pinned(64);
    OK(launch("add", Add{a, a, a, 16}, stream()));
    EXPECT(download(host, a, 64, stream()), FAILED);
}
CASE(an_event_covers_only_earlier_work, "", "an event or a wait is missing") {
    context_of(0);
    Pointer a = device(64);
    Handle first = stream(), second = stream(), early = event_after(first);
    OK(fill(a, 1, 64, first));
    OK(cu("cuStreamWaitEvent", second, early, 0u));
    EXPECT(fill(a, 1, 64, second), FAILED);
}
CASE(an_event_covers_no_other_stream, "", "an event or a wait is missing") {
    context_of(0);
    Pointer a = device(64);
    Handle first = stream(), second = stream();
    OK(fill(a, 1, 64, first)), order(second, second);
    EXPECT(fill(a, 1, 64, second), FAILED);
}
CASE(neighbours_do_not_conflict, "", nullptr) {
    context_of(0);
    Pointer a = device(128);
    Handle first = stream(), second = stream();
    for (int i = 0; i < 2; i++) {
        OK(launch("copy_vectors", Vectors{a, a + 16, 1}, first));
        OK(launch("copy_vectors", Vectors{a + 32, a + 48, 5}, second));
    }
}
CASE(a_later_write_keeps_the_rest_of_an_earlier_one, "", "writes bytes [40, 48) of") {
    context_of(0);
    Pointer a = device(64);
    Handle first = stream(), second = stream();
    OK(fill(a, 1, 64, first)), order(second, first);
    OK(fill(a + 16, 2, 16, second));
    EXPECT(fill(a + 40, 3, 8, stream()), FAILED);
}
CASE(a_reader_does_not_replace_the_writer, "", "reads bytes [0, 64) of") {
    context_of(0);
    Pointer a = device(64), b = device(64), c = device(64);
    Handle first = stream(), second = stream();
    OK(fill(a, 1, 64, first)), order(second, first);
    OK(move(b, a, 64, second));
    EXPECT(move(c, a, 64, stream()), FAILED);
}
CASE(readers_do_not_conflict, "", nullptr) {
    context_of(0);
    Pointer a = device(64), b = device(64), c = device(64);
    Handle first = stream(), second = stream();
    OK(fill(a, 1, 64, first)), order(second, first);
    OK(move(b, a, 64, first)), OK(move(c, a, 64, second));
    order(first, second);
    OK(fill(a, 2, 64, first));
}
CASE(a_write_conflicts_with_every_reader, "", "cuMemcpyDtoDAsync on non-blocking stream 2 of device 0 reads") {
    context_of(0);
    Pointer a = device(64), b = device(64), c = device(64);
    Handle first = stream(), second = stream();
    OK(move(b, a, 64, first)), OK(move(c, a, 64, second));
    EXPECT(fill(a, 2, 64, second), FAILED);
}
CASE(a_wait_of_the_host_orders_streams, "", nullptr) {
    context_of(0);
    Pointer a = device(64);
    Handle streams[] = {stream(), stream(), stream(), stream()};
    OK(fill(a, 1, 64, streams[0])), OK(synchronize(streams[0]));
    OK(fill(a, 1, 64, streams[1])), OK(cu("cuCtxSynchronize"));
    OK(fill(a, 1, 64, streams[2])), OK(cu("cuEventSynchronize", event_after(streams[2])));
    OK(fill(a, 1, 64, streams[3]));
    EXPECT(counted("host_waits"), 3);
}
CASE(a_wait_covers_no_other_stream, "", nullptr) {
    context_of(0);
    Pointer a = device(64);
    uint8_t* host = pinned(128);
    Handle first = stream(), second = stream();
    OK(fill(a, 1, 64, first)), order(second, first);
    OK(download(host, a, 64, first)), OK(download(host + 64, a, 64, second));
    OK(synchronize(first));
    OK(cu("cuStreamQuery", first));  // the host has waited for it
    EXPECT(host[1], 1);
    EXPECT(host[65], 0xA5);
    EXPECT(cu("cuStreamQuery", second), NOT_READY);
}
CASE(freeing_waits_for_nothing, "", nullptr) {
    context_of(0);
    Pointer a = device(64), b = device(64);
    uint8_t* host = pinned(64);
    Handle s = stream();
    OK(fill(a, 1, 64, s)), OK(download(host, a, 64, s));
    OK(cu("cuMemFree_v2", b));
    EXPECT(host[1], 0xA5);
    EXPECT(counted("host_waits"), 0);
}
CASE(a_plain_upload_does_not_order_other_streams, "", "which cuMemcpyHtoD on legacy") {
    context_of(0);
    Pointer a = device(64);
    char host[64] = {};
    OK(cu("cuMemcpyHtoD_v2", a, (const void*)host, (size_t)64));
    EXPECT(fill(a, 1, 64, stream()), FAILED);
}
CASE(a_plain_copy_waits_for_earlier_work, "", nullptr) {
    context_of(0);
    Pointer a = device(64), b = device(64);
    char host[64] = {};
    OK(fill(b, 1, 64, nullptr));
    OK(cu("cuMemcpyHtoD_v2", a, (const void*)host, (size_t)64));
    OK(fill(b, 2, 64, stream()));
}
CASE(plain_copies_are_visible_to_the_host, "", nullptr) {
    context_of(0);
    Pointer a = device(64);
    uint8_t *host = pinned(64), plain[64];
    memset(host, 3, 64);
    OK(cu("cuMemcpyHtoD_v2", a, (const void*)host, (size_t)64));
    memset(host, 4, 64);
    OK(cu("cuMemcpyDtoH_v2", (void*)host, a, (size_t)64));
    EXPECT(host[63], 3);
    OK(download(plain, a, 64, stream()));
    EXPECT(plain[63], 3);
}

CASE(an_early_read_of_the_host_finds_poison, "STANDIN_QUERIES=2", nullptr) {
    context_of(0);
    Pointer a = device(64);
    uint8_t* host = pinned(64);
    Handle s = stream();
    OK(fill(a, 7, 64, s)), OK(download(host, a, 64, s));
    for (int i = 0; i < 2; i++) EXPECT(cu("cuStreamQuery", s), NOT_READY), EXPECT(host[5], 0xA5);
    OK(cu("cuStreamQuery", s));
    EXPECT(host[5], 7);
}
CASE(a_write_of_the_host_under_a_copy_is_found, "", "the host wrote to bytes [0, 64) of pinned allocation") {
    context_of(0);
    Pointer a = device(64);
    uint8_t* host = pinned(64);
    Handle s = stream();
    OK(download(host, a, 64, s));
    host[9] = 1;
    EXPECT(synchronize(s), FAILED);
}
CASE(a_source_changed_under_a_copy_is_found, "", "the host changed bytes [16, 48) of pinned allocation") {
    context_of(0);
    Pointer a = device(64);
    uint8_t* host = pinned(64);
    Handle s = stream();
    OK(upload(a, host + 16, 32, s));
    host[15] = 1, host[48] = 1;
    EXPECT(cu("cuStreamQuery", s), NOT_READY);
    host[20] = 1;
    EXPECT(cu("cuStreamQuery", s), FAILED);
    expect_broken(FAILED);
}
CASE(a_changed_source_is_found_before_a_kernel_overwrites_it, "", "the host changed") {
    context_of(0);
    Pointer a = device(64);
    uint8_t* host = pinned(64);
    Handle s = stream();
    OK(upload(a, host, 32, s));
    host[0] ^= 1;
    EXPECT(launch("add", Add{(Pointer)host, a, a, 8}, s), FAILED);
}
CASE(devices_see_data_that_the_host_does_not, "", nullptr) {
    context_of(0);
    const size_t n = 64, bytes = n * 4;
    Pointer a = device(bytes), b = device(bytes), c = device(bytes);
    uint8_t* host = pinned(3 * bytes);
    Handle s = stream(), other = stream();
    OK(upload(a, ramp(n, 0.25).data(), bytes, s));
    OK(download(host, a, bytes, s));
    OK(upload(b, host, bytes, s));                                                        // a copy back
    OK(launch("add", Add{(Pointer)host + bytes, (Pointer)host, b, n}, s));                // 0.5, in pinned memory
    OK(download(host + 2 * bytes, b, bytes, s));                                          // a neighbour in flight
    OK(launch("add", Add{c, (Pointer)host + bytes, (Pointer)host + bytes, n}, s));        // 1.0
    OK(launch("add", Add{(Pointer)host, (Pointer)host + bytes, c, n}, s));                // 1.5, over the first copy
    for (size_t i = 0; i < 3; i++) EXPECT(host[i * bytes + 11], 0xA5);
    order(other, s);
    OK(move(a, (Pointer)host, bytes, other));
    OK(synchronize(other));
    EXPECT(differing_sums((float*)host, n), 0);
    EXPECT(((float*)host)[2 * n + 5] == 1.25f, true);
}
CASE(a_source_is_compared_as_the_device_saw_it, "", nullptr) {
    context_of(0);
    Pointer a = device(64);
    uint8_t* host = pinned(64);
    Handle s = stream();
    OK(fill(a, 9, 64, s));
    OK(download(host, a, 32, s)), OK(download(host + 32, a, 32, s));
    OK(upload(a, host, 64, s));
    OK(download(host + 32, a, 32, s));
    EXPECT(host[0], 0xA5);
    OK(synchronize(s));
    EXPECT(host[0], 9);
}
CASE(pinned_memory_freed_while_read, "", "while the host has not waited for cuMemcpyHtoDAsync") {
    context_of(0);
    uint8_t* host = pinned(64);
    OK(upload(device(64), host, 64, stream()));
    EXPECT(cu("cuMemFreeHost", (void*)host), FAILED);
    OK(cu("cuMemFreeHost", (void*)host));  // on a broken device, freeing succeeds
}
CASE(pinned_memory_freed_too_early, "", "while the host has not waited for cuMemcpyDtoHAsync") {
    context_of(0);
    Pointer a = device(64);
    uint8_t* host = pinned(64);
    OK(download(host, a, 64, stream()));
    EXPECT(cu("cuMemFreeHost", (void*)host), FAILED);
}

CASE(stream_ordered_memory, "", nullptr) {
    context_of(0);
    Handle s = stream(), other = stream();
    Pointer a, b;
    OK(cu("cuMemAllocAsync", &a, (size_t)64, s));
    OK(cu("cuMemAllocAsync", &b, (size_t)64, s));
    order(other, s);
    OK(fill(a, 1, 64, other)), OK(fill(b, 1, 64, other));
    order(s, other);
    OK(cu("cuMemFreeAsync", a, s));
    OK(synchronize(other));
    OK(cu("cuMemFree_v2", b));
}
CASE(stream_ordered_memory_used_elsewhere, "", "which cuMemAllocAsync on") {
    context_of(0);
    Pointer a;
    OK(cu("cuMemAllocAsync", &a, (size_t)64, stream()));
    EXPECT(fill(a, 1, 64, stream()), FAILED);
}
CASE(stream_ordered_memory_freed_while_used_elsewhere, "", "cuMemFreeAsync on") {
    context_of(0);
    Pointer a = device(64);
    OK(fill(a, 1, 64, stream()));
    EXPECT(cu("cuMemFreeAsync", a, stream()), FAILED);
}
CASE(stream_ordered_memory_freed_without_waiting, "", "while the host has not waited for cuMemsetD8Async") {
    context_of(0);
    Pointer a;
    Handle s = stream();
    OK(cu("cuMemAllocAsync", &a, (size_t)64, s));
    OK(fill(a, 1, 64, s));
    EXPECT(cu("cuMemFree_v2", a), FAILED);
}
