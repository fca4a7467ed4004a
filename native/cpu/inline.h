/* inline.h: functions that must be in line, for the registers that they keep or the instructions that they hold. */
#pragma once

#if defined(__GNUC__)
#define XQ_INLINE inline __attribute__((always_inline))
#else
#define XQ_INLINE inline
#endif
