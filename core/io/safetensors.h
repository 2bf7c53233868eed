/* safetensors.h: what orepa_load_safetensors does with a file that is open, or that lies in memory. */
#ifndef OREPA_CORE_IO_SAFETENSORS_H
#define OREPA_CORE_IO_SAFETENSORS_H

#include "io/file.h"
#include "orepa_io.h"

orepa_archive *safetensors_read(const file_reader *file, const orepa_device *device);

#endif
