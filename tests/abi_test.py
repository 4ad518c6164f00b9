"""abi_test.py HEADERS LIST [LIBRARY COMPILER...]: the ABI that kvmix/kvmix.h promises.

Compiles and runs a C program that takes the address of every function that the header declares and
prints the size of every struct, the place of every field and the number of every enumerator.
What it prints is LIST (lib/abi.txt), and LIBRARY, libkvmix.so, exports these functions and nothing
else. With KVMIX_UPDATE=1 in the environment LIST is written instead.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile


def text_of(header):
    return re.sub(r'/\*.*?\*/|//[^\n]*', '', header.read_text(), flags=re.S)


def fields(body):
    """The names in a struct's body."""
    for line in body.split(';'):
        pointer = re.search(r'\(\*(\w+)\)', line)
        if pointer:
            yield pointer[1]
        elif line.strip():
            yield from (re.search(r'(\w+)(\[\d+\])?\s*$', part)[1] for part in line.split(','))


def program(functions, structs, enumerators):
    lines = ['#include <stddef.h>', '#include <stdio.h>', '#include "kvmix/kvmix.h"']
    lines += ['typedef void (*function)(void);', 'int main(void) {', '  const function all[] = {']
    lines += [f'    (function){name},' for name in functions]
    lines += ['  };', '  for (size_t i = 0; i < sizeof(all) / sizeof(*all); ++i)',
              '    if (all[i] == NULL) return 1;']
    lines += [f'  printf("%s\\n", "{name}");' for name in functions]
    for name, body in structs:
        lines.append(f'  printf("{name} %zu:", sizeof({name}));')
        lines += [f'  printf(" {f} %zu", offsetof({name}, {f}));' for f in fields(body)]
        lines.append('  printf("\\n");')
    lines += [f'  printf("{name} %d\\n", (int){name});' for name in enumerators]
    return '\n'.join([*lines, '  return 0;', '}', ''])


def main():
    headers, listed = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    library, compiler = sys.argv[3], sys.argv[4:]
    door = text_of(headers / 'kvmix/kvmix.h')
    functions = sorted(re.findall(r'^KVMIX_API [^(]*?(kvmix_\w+)\(', door, flags=re.M))
    structs = re.findall(r'typedef struct \w+ \{(.*?)\} (\w+);', door, flags=re.S)
    types = text_of(headers / 'kvmix/types.h')
    enums = re.findall(r'typedef enum [^{]*\{(.*?)\}', types, flags=re.S)
    enumerators = re.findall(r'(KVMIX_\w+) =', ''.join(enums))
    with tempfile.TemporaryDirectory() as folder:
        source, binary = pathlib.Path(folder) / 'abi.c', pathlib.Path(folder) / 'abi'
        source.write_text(program(functions, [(n, b) for b, n in structs], enumerators))
        subprocess.run([*compiler, '-x', 'c', '-std=c11', '-Wall', '-Werror', f'-I{headers}',
                        source, '-x', 'none', '-o', binary, library], check=True)
        environment = {**os.environ, 'LD_LIBRARY_PATH': str(pathlib.Path(library).parent)}
        printed = subprocess.run([binary], env=environment, check=True, capture_output=True,
                                 text=True).stdout
    if os.environ.get('KVMIX_UPDATE'):
        listed.write_text(printed)
    wrong = sorted(set(listed.read_text().splitlines()) ^ set(printed.splitlines()))
    symbols = subprocess.run(['nm', '-D', '--defined-only', library], check=True,
                             capture_output=True, text=True).stdout.splitlines()
    exported = {line.split()[-1].split('@')[0] for line in symbols} - {'_init', '_fini'}
    for name in sorted(exported ^ set(functions)):
        where = 'declared' if name in functions else 'exported'
        wrong.append(f'{name}: only {where}')
    sys.exit('\n'.join([f'{listed}: differs from the headers and the library', *wrong])
             if wrong else 0)


if __name__ == '__main__':
    main()
