// Stand-in for the CUDA libraries that candle links beside the driver. Devices open; every computation fails.
#define OPENS(name) int name(void** handle) { return *handle = &handle, 0; }
#define SUCCEEDS(name) int name(void) { return 0; }
#define FAILS(name) int name(void) { return 1; }

OPENS(cublasCreate_v2)
SUCCEEDS(cublasSetStream_v2)
SUCCEEDS(cublasDestroy_v2)
FAILS(cublasDgemmStridedBatched)
FAILS(cublasGemmStridedBatchedEx)

OPENS(curandCreateGenerator)
SUCCEEDS(curandSetStream)
SUCCEEDS(curandSetPseudoRandomGeneratorSeed)
SUCCEEDS(curandDestroyGenerator)
FAILS(curandGenerateNormal)
FAILS(curandGenerateNormalDouble)
FAILS(curandGenerateUniform)
FAILS(curandGenerateUniformDouble)
