// Cases of the self test: bounds, handles, limits, failures on demand, and conversions.
#pragma once
#include "selftest.h"

CASE(copies_out_of_bounds, "", "end 1 bytes past the end of device allocation 1 (100 bytes") {
    context_of(0);
    Pointer a = device(100), b = device(100);
    char host[200] = {};
    uint8_t* page_locked = pinned(50);
    OK(upload(a + 50, host, 50, nullptr));
    EXPECT(upload(a + 50, host, 51, nullptr), INVALID);
    EXPECT(upload(a - 1, host, 2, nullptr), INVALID);
    EXPECT(upload(a, page_locked, 51, nullptr), INVALID);
    EXPECT(download(host, a + 100, 1, nullptr), INVALID);
    EXPECT(download((void*)b, a, 1, nullptr), INVALID);
    EXPECT(fill(a, 0, 101, nullptr), INVALID);
    EXPECT(move(b, a + 1, 100, nullptr), INVALID);
    EXPECT(move(a, a + 10, 50, nullptr), INVALID);
    EXPECT(cu("cuMemsetD32Async", a + 2, 1u, (size_t)1, Handle(nullptr)), INVALID);
    OK(cu("cuCtxSynchronize"));
}
CASE(a_kernel_reads_out_of_bounds, "", "kernel add reads 4 bytes at 0x") {
    context_of(0);
    Pointer a = device(64), b = device(63);
    EXPECT(launch("add", Add{a, a, b, 16}, nullptr), ADDRESS);
    expect_broken(ADDRESS);
}
CASE(a_kernel_writes_far_out_of_bounds, "", "bytes past the end of device allocation 1 (64 bytes") {
    context_of(0);
    Pointer a = device(64);
    EXPECT(launch("add", Add{a + 8192, a, a, 16}, nullptr), ADDRESS);
}
CASE(use_after_free, "", "which was freed") {
    context_of(0);
    Pointer a = device(64), b = device(64);
    OK(cu("cuMemFree_v2", a));
    EXPECT(fill(a, 0, 64, nullptr), INVALID);
    EXPECT(cu("cuMemFree_v2", a), INVALID);
    EXPECT(cu("cuMemFree_v2", b + 1), INVALID);
    EXPECT(cu("cuMemFreeHost", (void*)b), INVALID);
    EXPECT(launch("add", Add{b, a, a, 16}, nullptr), ADDRESS);
}
CASE(misaligned, "", "reads 16 bytes at 0x") {
    context_of(0);
    Pointer a = device(128), b = device(128);
    OK(launch("copy_vectors", Vectors{b, a, 8}, nullptr));
    EXPECT(launch("copy_vectors", Vectors{b, a + 8, 4}, nullptr), MISALIGNED);
    expect_broken(MISALIGNED);
}
CASE(foreign_device, "", "is on device 0, but the context is that of device 1") {
    context_of(0);
    Pointer a = device(64);
    char host[64] = {};
    Handle s = stream();
    context_of(1);
    Pointer b = device(64);
    EXPECT(upload(a, host, 64, nullptr), INVALID);
    EXPECT(move(b, a, 64, nullptr), INVALID);
    EXPECT(launch("add", Add{b, b, a, 16}, nullptr), INVALID);
    EXPECT(launch("add", Add{b, a, b, 16}, nullptr), INVALID);
    EXPECT(fill(b, 1, 64, s), HANDLE);
    OK(launch("add", Add{b, b, b, 16}, nullptr));
    EXPECT(counted("kernel_written_bytes"), 64);
    OK(cu("cuCtxSynchronize"));
}
CASE(atomics, "", nullptr) {
    context_of(0);
    std::vector<uint32_t> values(5000, 2);
    values[777] = 90, values[1234] = 9, values[4321] = 7;
    Pointer a = device(20000), most = device(4), least = device(8);
    uint32_t found = 0;
    uint64_t index = 0;
    OK(upload(a, values.data(), 20000, nullptr)), OK(fill(most, 0, 4, nullptr)), OK(fill(least, 0xFF, 8, nullptr));
    OK(launch("extremes", Extremes{a, most, least, 5000}, nullptr, 1));
    OK(download(&found, most, 4, nullptr)), OK(download(&index, least, 8, nullptr));
    EXPECT(found, 90);
    EXPECT(index, 1234);
}

CASE(limits, "STANDIN_MEMORY=1000 STANDIN_PINNED=500", nullptr) {
    context_of(0);
    Pointer a = device(600), b;
    size_t free_bytes, total;
    void* host;
    EXPECT(cu("cuMemAlloc_v2", &b, (size_t)401), MEMORY);
    EXPECT(cu("cuMemAlloc_v2", &b, (size_t)-1), MEMORY);
    OK(cu("cuMemGetInfo_v2", &free_bytes, &total));
    EXPECT(free_bytes, 400);
    EXPECT(total, 1000);
    OK(cu("cuMemFree_v2", a));
    OK(cu("cuMemAllocAsync", &b, (size_t)1000, Handle(nullptr)));
    EXPECT(cu("cuMemHostAlloc", &host, (size_t)501, 0u), MEMORY);
    OK(cu("cuMemHostAlloc", &host, (size_t)500, 0u));
    EXPECT(((uint8_t*)host)[499], 0xA7);
    context_of(1);
    device(1000);
    EXPECT(counted("peak_device_bytes"), 2000);
    EXPECT(counted("peak_pinned_bytes"), 500);
}
CASE(an_allocation_fails, "STANDIN_FAIL_ALLOC=2", nullptr) {
    context_of(0);
    Pointer a = device(8);
    EXPECT(cu("cuMemAlloc_v2", &a, (size_t)8), MEMORY);
    device(8);
}
CASE(a_launch_fails, "STANDIN_FAIL_LAUNCH=2", "STANDIN_FAIL_LAUNCH") {
    context_of(0);
    Pointer a = device(64);
    OK(launch("add", Add{a, a, a, 16}, nullptr));
    EXPECT(launch("add", Add{a, a, a, 16}, nullptr), ADDRESS);
    expect_broken(ADDRESS);
}
CASE(a_copy_fails, "STANDIN_FAIL_COPY=1", "STANDIN_FAIL_COPY") {
    context_of(0);
    Pointer a = device(64), b = device(64);
    EXPECT(move(a, b, 64, nullptr), FAILED);
    expect_broken(FAILED);
}
CASE(no_devices, "STANDIN_DEVICES=0", nullptr) { EXPECT(cu("cuInit", 0u), NO_DEVICE); }
CASE(init_fails, "STANDIN_INIT=803", nullptr) { EXPECT(cu("cuInit", 0u), 803); }
CASE(an_older_driver, "STANDIN_DRIVER=12080", nullptr) {
    int version;
    Handle module;
    context_of(0);
    OK(cu("cuDriverGetVersion", &version));
    EXPECT(version, 12080);
    EXPECT(cu("cuModuleLoadData", &module, (const void*)image), PTX);
}
CASE(an_image_for_other_devices, "STANDIN_REJECT_IMAGE=1", nullptr) {
    Handle module;
    context_of(0);
    EXPECT(cu("cuModuleLoadData", &module, (const void*)image), NO_BINARY);
}
CASE(wrong_names_and_handles, "", "there is no kernel subtract") {
    Handle module, function, context;
    Pointer a;
    OK(cu("cuInit", 0u));
    EXPECT(cu("cuMemAlloc_v2", &a, (size_t)8), CONTEXT);
    EXPECT(cu("cuDevicePrimaryCtxRetain", &context, 2), 101);
    context_of(0);
    EXPECT(cu("cuModuleLoadData", &module, (const void*)".version 9.0"), IMAGE);
    OK(cu("cuModuleLoadData", &module, (const void*)image));
    EXPECT(cu("cuModuleGetFunction", &function, module, "subtract"), NOT_FOUND);
    Handle s = stream();
    OK(cu("cuStreamDestroy_v2", s));
    EXPECT(synchronize(s), HANDLE);
    EXPECT(launch("add", Add{}, nullptr, 1, 1025), INVALID);
    EXPECT(launch("add", Add{}, nullptr, 0, 64), INVALID);
}
CASE(devices_and_errors, "STANDIN_CAPABILITY=86", nullptr) {
    char name[32], uuid[2][16];
    const char* text;
    int value = 0;
    context_of(0);
    OK(cu("cuDeviceGetCount", &value)), EXPECT(value, 2);
    OK(cu("cuDeviceGetName", name, 32, 1)), EXPECT(strcmp(name, "Stand-in GPU 1"), 0);
    OK(cu("cuDeviceGetAttribute", &value, 75, 0)), EXPECT(value, 8);
    OK(cu("cuDeviceGetAttribute", &value, 76, 0)), EXPECT(value, 6);
    for (int i : {0, 1}) OK(cu("cuDeviceGetUuid_v2", uuid[i], i));
    EXPECT(memcmp(uuid[0], uuid[1], 16) != 0, true);
    OK(cu("cuGetErrorName", 719, &text)), EXPECT(strcmp(text, "CUDA_ERROR_LAUNCH_FAILED"), 0);
    OK(cu("cuGetErrorString", 2, &text)), EXPECT(strcmp(text, "out of memory"), 0);
}
CASE(elapsed_time, "", "elapsed time needs") {
    context_of(0);
    Handle timed[2];
    float milliseconds = -1;
    for (Handle& it : timed) OK(cu("cuEventCreate", &it, 0u));
    EXPECT(cu("cuEventElapsedTime", &milliseconds, timed[0], timed[1]), HANDLE);
    for (Handle it : timed) OK(fill(device(64), 0, 64, nullptr)), OK(cu("cuEventRecord", it, Handle(nullptr)));
    EXPECT(cu("cuEventElapsedTime_v2", &milliseconds, timed[0], timed[1]), NOT_READY);
    OK(cu("cuEventSynchronize", timed[1]));
    OK(cu("cuEventElapsedTime_v2", &milliseconds, timed[0], timed[1]));
    EXPECT(milliseconds >= 0, true);
}

// Converts every f16 and bf16 value back to itself, and values between two neighbours to the nearer one, or to the even
// one from the middle.
CASE(conversions_to_16_bits, "", nullptr) {
    for (uint32_t bits = 0; bits < 0x7c00; bits++) {
        float here = f16_to_f32((uint16_t)bits), next = bits == 0x7bff ? 65536.0f : f16_to_f32((uint16_t)(bits + 1));
        float middle = (here + next) / 2;
        float below = bits_f32(f32_bits(middle) - 1), above = bits_f32(f32_bits(middle) + 1);
        bool right = f32_to_f16(here) == bits && f32_to_f16(-here) == (bits | 0x8000) && f32_to_f16(below) == bits &&
                     f32_to_f16(middle) == bits + bits % 2 && f32_to_f16(above) == bits + 1;
        if (!right) EXPECT(bits, UINT64_MAX);
    }
    for (uint32_t bits = 0; bits < 0x7f80; bits++) {
        uint32_t middle = bits << 16 | 0x8000;
        float here = bf16_to_f32((uint16_t)bits), below = bits_f32(middle - 1), above = bits_f32(middle + 1);
        bool right = f32_to_bf16(here) == bits && f32_to_bf16(-here) == (bits | 0x8000) && f32_to_bf16(below) == bits &&
                     f32_to_bf16(bits_f32(middle)) == bits + bits % 2 && f32_to_bf16(above) == bits + 1;
        if (!right) EXPECT(bits, UINT64_MAX);
    }
    for (uint32_t nan : {0x7f800001u, 0x7fffffffu, 0xffc00000u, 0xff800001u}) {
        EXPECT(f32_to_f16(bits_f32(nan)), 0x7fff);
        EXPECT(f32_to_bf16(bits_f32(nan)), 0x7fff);
    }
    EXPECT(f32_bits(fma_f32(0x1.000002p0f, 0x1.fffffep-1f, -1.0f)), 0x337ffffe);  // 0 if the product were rounded
    EXPECT(f32_bits(f64_to_f32(0x1.000001p0)), 0x3f800000);
}
