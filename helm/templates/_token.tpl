{{/*
An API key of a trial, in the form of registry/tenants/keys.py: lry_<12>_<32><CRC-32 of all before, as 6 characters base62>.
A test holds both equal. Templates have no xor and no shift, hence the arithmetic.
*/}}
{{- define "lorary.token" -}}
{{- $body := printf "lry_%s_%s" (randAlphaNum 12) (randAlphaNum 32) -}}
{{- $body }}{{ include "lorary.checksum" $body }}
{{- end -}}

{{- define "lorary.checksum" -}}
{{- $text := . -}}
{{- $crc := 4294967295 -}}
{{- range $i := until (len $text) -}}
{{- $crc = include "lorary.xor" (list $crc (index $text $i)) | int64 -}}
{{- range until 8 -}}
{{- $odd := eq (mod $crc 2) 1 -}}
{{- $crc = div $crc 2 -}}
{{- if $odd -}}{{- $crc = include "lorary.xor" (list $crc 3988292384) | int64 -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- $crc = sub 4294967295 $crc -}}
{{- $digits := "" -}}
{{- range until 6 -}}
{{- $digits = printf "%c%s" (index "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" (mod $crc 62 | int)) $digits -}}
{{- $crc = div $crc 62 -}}
{{- end -}}
{{- $digits -}}
{{- end -}}

{{/* Of two numbers of 32 bits. */}}
{{- define "lorary.xor" -}}
{{- $a := int64 (index . 0) -}}
{{- $b := int64 (index . 1) -}}
{{- $out := 0 -}}
{{- $bit := 1 -}}
{{- range until 32 -}}
{{- if ne (mod $a 2) (mod $b 2) -}}{{- $out = add $out $bit -}}{{- end -}}
{{- $a = div $a 2 -}}
{{- $b = div $b 2 -}}
{{- $bit = mul $bit 2 -}}
{{- end -}}
{{- $out -}}
{{- end -}}
