// Some seconds of work for the compiler alone.
#ifndef WORK
#define WORK 300000
#endif
constexpr int work(int seed) {
    unsigned value = seed;
    for (int i = 0; i < WORK; i++) value = value * 1664525u + 1013904223u;
    return static_cast<int>(value >> 1);
}
