/* Adds up what lies in memory, from as many threads as call it: the speed of reading and nothing else. */
#include <stddef.h>
#include <stdint.h>

uint64_t add_up(const uint64_t *values, size_t num_values) {
    uint64_t sums[32] = {0}, total = 0; /* independent sums, so that no addition waits for another */
    for (size_t i = 0; i + 32 <= num_values; i += 32)
        for (size_t j = 0; j < 32; j++) sums[j] += values[i + j];
    for (size_t j = 0; j < 32; j++) total += sums[j];
    return total;
}
