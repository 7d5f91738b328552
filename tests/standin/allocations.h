// Entry points that allocate and free.
#pragma once
#include "streams.h"

namespace standin {

static void* new_memory(Kind kind, uint64_t bytes, bool stream_ordered) {
    return (void*)allocate(kind, context().device, bytes, stream_ordered).begin;
}
API cuMemAlloc_v2(Pointer* out, size_t bytes) {
    return call([=] {
        check_captures("cuMemAlloc");
        *out = (Pointer)new_memory(device_memory, bytes, false);
    });
}
API cuMemAllocAsync(Pointer* out, size_t bytes, void* handle) {
    return call([=] {
        Stream& stream = working_stream(handle);
        Allocation& made = allocate(device_memory, stream.context->device, bytes, true);
        note(whole(made), writes, enqueue(stream, "cuMemAllocAsync"), stream.clock);
        *out = made.begin;
    });
}
API cuMemHostAlloc(void** out, size_t bytes, unsigned) {
    return call([=] {
        check_captures("cuMemHostAlloc");
        *out = new_memory(pinned_memory, bytes, false);
    });
}
API cuMemAllocHost_v2(void** out, size_t bytes) { return cuMemHostAlloc(out, bytes, 0); }
API cuMemHostGetDevicePointer_v2(Pointer* out, void* pointer, unsigned) {
    return call([=] {
        *out = device_span("cuMemHostGetDevicePointer", context().device, (uintptr_t)pointer, 1).address;
    });
}
static void check_finished(const Allocation& gone) {
    if (Work work = unfinished(gone))
        break_device(launch_failed, "freeing %s, while the host has not waited for %s", gone.name().c_str(),
                     describe(work).c_str());
}
// Does not wait, because NVIDIA promises no more than that it may.
API cuMemFree_v2(Pointer pointer) {
    return call(tolerant, [=] {
        if (!pointer) return;
        Allocation& gone = owned(pointer, device_memory);
        if (!sticky_code) check_captures("cuMemFree"), check_finished(gone);
        deallocate(gone);
    });
}
API cuMemFreeAsync(Pointer pointer, void* handle) {
    return call(tolerant, [=] {
        Allocation& gone = owned(pointer, device_memory);
        if (!sticky_code) {
            Stream& stream = working_stream(handle);
            note(whole(gone), writes, enqueue(stream, "cuMemFreeAsync"), stream.clock);
        }
        deallocate(gone);
    });
}
API cuMemFreeHost(void* pointer) {
    return call(tolerant, [=] {
        Allocation& gone = owned((uintptr_t)pointer, pinned_memory);
        if (!sticky_code) check_captures("cuMemFreeHost"), check_finished(gone);
        staged().erase(&gone);
        deallocate(gone);
    });
}
// Pins memory of the program.
API cuMemHostRegister_v2(void* pointer, size_t bytes, unsigned) {
    return call([=] {
        check_captures("cuMemHostRegister");
        if (!settings().can_register) throw Failure{not_supported, false, ""};
        uintptr_t begin = (uintptr_t)pointer;
        auto next = memory().live.lower_bound(begin);
        if (find(begin) || (next != memory().live.end() && next->first < begin + bytes))
            refuse(already_registered, "0x%lx: part of %lu bytes is pinned already", begin, bytes);
        reserve(pinned_memory, context().device, bytes);
        count("registered_bytes") += bytes;
        insert(begin, bytes, pinned_memory, context().device).registered = true;
    });
}
API cuMemHostUnregister(void* pointer) {
    return call(tolerant, [=] {
        Allocation& gone = owned((uintptr_t)pointer, pinned_memory, true);
        if (!sticky_code) check_captures("cuMemHostUnregister"), check_finished(gone);
        staged().erase(&gone);
        count("registered_bytes") -= gone.bytes;
        deallocate(gone);
    });
}
API cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    return call([=] { *total = settings().memory, *free_bytes = *total - memory().device_bytes[context().device]; });
}
API cuPointerGetAttribute(void* out, int attribute, Pointer pointer) {
    return call([=] {
        Allocation* it = find(pointer);
        if (!it) throw Failure{invalid_value, false, ""};
        if (attribute == 1) *(void**)out = driver().contexts[it->device];
        else if (attribute == 2) *(unsigned*)out = it->kind == device_memory ? 2 : 1;
        else if (attribute == 3 || attribute == 4) *(Pointer*)out = pointer;
        else if (attribute == 9) *(int*)out = it->device;
        else if (attribute == 11) *(Pointer*)out = it->begin;
        else if (attribute == 12) *(size_t*)out = it->bytes;
        else refuse(not_supported, "pointer attribute %d", attribute);
    });
}

}  // namespace standin
