// Cases about time: stalls of streams, late copies, waits that spin; and about registered memory.
#pragma once
#include "selftest.h"

static uint64_t stalled(Handle stream) {
    return ((uint64_t(*)(Handle))dlsym(library, "standin_stalled"))(stream);
}
static void work(Handle stream, uint64_t nanoseconds) {
    ((void (*)(Handle, uint64_t))dlsym(library, "standin_work"))(stream, nanoseconds);
}
static void late_copies(int on) { ((void (*)(int))dlsym(library, "standin_late_copies"))(on); }

CASE(a_wait_stalls_for_what_is_left_of_a_copy, "STANDIN_BUS=1000", nullptr) {
    context_of(0);
    Handle training = stream(), copying = stream();
    Pointer a = device(5000);
    uint8_t* host = pinned(5000);
    OK(fill(a, 1, 5000, copying));
    OK(cu("cuMemcpyDtoHAsync_v2", (void*)host, a, (size_t)5000, copying));
    Handle copied = event_after(copying);
    work(training, 2000);
    OK(cu("cuStreamWaitEvent", training, copied, 0u));
    EXPECT(stalled(training) / 100, 30);
    OK(cu("cuStreamWaitEvent", training, copied, 0u));
    EXPECT(stalled(training) / 100, 30);
    EXPECT(stalled(copying), 0);
    // The host has waited since: nothing is left.
    Handle later = stream();
    OK(synchronize(copying));
    OK(cu("cuStreamWaitEvent", later, copied, 0u));
    EXPECT(stalled(later), 0);
}
CASE(a_late_copy_reads_when_it_is_waited_for, "", nullptr) {
    context_of(0);
    Handle training = stream(), copying = stream();
    Pointer a = device(64);
    uint8_t* host = pinned(64);
    auto copied = [&] {
        OK(cu("cuMemcpyDtoHAsync_v2", (void*)host, a, (size_t)64, copying));
        return event_after(copying);
    };
    OK(fill(a, 1, 64, copying));
    OK(synchronize(copying));
    for (int late : {0, 1}) {
        late_copies(late);
        memset((void*)a, 1, 64);  // in the place of the device
        copied();
        memset((void*)a, 2, 64);
        OK(synchronize(copying));
        EXPECT(host[63], late ? 2 : 1);
    }
    memset((void*)a, 1, 64);
    OK(cu("cuStreamWaitEvent", training, copied(), 0u));
    memset((void*)a, 2, 64);
    OK(synchronize(copying));
    EXPECT(host[63], 1);
    copied();
    OK(fill(a, 3, 64, copying));  // later work of the same stream
    OK(synchronize(copying));
    EXPECT(host[63], 2);
    late_copies(0);
}
CASE(waits_that_spin_are_counted, "", nullptr) {
    context_of(0);
    Handle s = stream(), spinning, sleeping;
    OK(cu("cuEventCreate", &spinning, 2u));
    OK(cu("cuEventCreate", &sleeping, 3u));
    Pointer a = device(64);
    OK(fill(a, 1, 64, s));
    OK(cu("cuEventRecord", sleeping, s));
    OK(cu("cuEventSynchronize", sleeping));
    EXPECT(counted("spins"), 0);
    OK(fill(a, 1, 64, s));
    OK(cu("cuEventRecord", spinning, s));
    OK(cu("cuEventSynchronize", spinning));
    EXPECT(counted("spins"), 1);
    OK(synchronize(s));  // nothing is left to wait for
    EXPECT(counted("spins"), 1);
    OK(fill(a, 1, 64, s));
    OK(synchronize(s));
    EXPECT(counted("spins"), 2);
}
CASE(registered_memory_is_pinned, "", "part of 64 bytes is pinned already") {
    context_of(0);
    Handle s = stream();
    Pointer a = device(64);
    static uint8_t host[128];
    OK(cu("cuMemHostRegister_v2", (void*)host, (size_t)64, 0u));
    EXPECT(cu("cuMemHostRegister_v2", (void*)(host + 32), (size_t)64, 0u), 712);
    EXPECT(counted("pinned_bytes"), 64);
    OK(fill(a, 7, 64, s));
    OK(cu("cuMemcpyDtoHAsync_v2", (void*)host, a, (size_t)64, s));
    EXPECT(host[0], 0xA5);
    OK(synchronize(s));
    EXPECT(host[0], 7);
    OK(cu("cuMemHostUnregister", (void*)host));
    EXPECT(counted("pinned_bytes"), 0);
    EXPECT(host[63], 7);
}
