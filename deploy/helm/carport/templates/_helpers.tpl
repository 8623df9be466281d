{{- define "carport.labels" -}}
app.kubernetes.io/name: carport
app.kubernetes.io/part-of: carport
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{/* The driver's name: pods and the CSIDriver object say the same one. */}}
{{- define "carport.driver" -}}
{{ dig "csi" "driverName" "csi.carport.dev" .Values.config }}
{{- end }}

{{/* The agent's configuration file. */}}
{{- define "carport.config" -}}
{{- $list := dict "prepull" (dict "list" "/etc/carport/prepull/list.yaml") -}}
{{- $sessions := dict "stream" (dict "start" false) -}}
{{ mergeOverwrite (deepCopy .Values.config) $list $sessions | toYaml }}
{{- end }}

{{/* The port of IP:PORT. */}}
{{- define "carport.port" -}}
{{ splitList ":" . | last }}
{{- end }}
